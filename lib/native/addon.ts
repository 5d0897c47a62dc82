/** The native addon as TypeScript sees it. Everything else about native code derives from here. */

/** Bytes owned by native code. Wrapped by `Tensor`. */
export interface NativeStorage {
  /** Copies the whole array to `byteOffset`. */
  write(source: ArrayBufferView, byteOffset: number): void;
  /** Fills the whole array from `byteOffset`. */
  read(target: ArrayBufferView, byteOffset: number): void;
  dispose(): void;
}

/** What an op's native function takes for a buffer; undefined and null mean "absent". */
export type NativeBuffer = ArrayBufferView | NativeStorage | undefined | null;

/** A synchronous native op: parameters in the order of `params[op].names`, then buffers. */
export type NativeOp = (params: Float64Array, ...buffers: NativeBuffer[]) => void;

/** The off-thread twin. Returns the id of the job; the callback gets undefined or an Error. */
export type NativeAsyncOp = (
  callback: (error: Error | undefined) => void,
  params: Float64Array,
  ...buffers: NativeBuffer[]
) => number;

/** Names of an op's parameters, in order, and their defaults. */
export interface ParamTable {
  readonly names: readonly string[];
  readonly defaults: readonly number[];
}

export interface NativeInfo {
  readonly version: string;
  readonly napi: number;
  readonly compiler: string;
  readonly threads: number;
  readonly simd: string;
  readonly simdLevels: readonly string[];
  /** Why `VLM_GRPO_SIMD` could not be honoured. */
  readonly simdError?: string;
  readonly dtypeSizes: readonly number[];
}

export interface MemoryStats {
  /** Native tensors that exist now, in all threads of the process. */
  readonly liveTensors: number;
  readonly liveBytes: number;
  readonly peakBytes: number;
  /** Freed blocks that are kept for the next tensor of their size; see `emptyCache()`. */
  readonly cachedBytes: number;
}

export interface NativeAddon {
  readonly NativeStorage: new (bytes: number, zero: boolean) => NativeStorage;
  readonly params: Readonly<Record<string, ParamTable>>;
  readonly enums: Readonly<Record<string, readonly string[]>>;
  info(): NativeInfo;
  memoryStats(): MemoryStats;
  setSimdLevel(name: string): void;
  emptyCache(): void;
  /** 0 restores the default. */
  setThreads(threads: number): void;
  abortJob(id: number): void;
  readonly [op: string]: unknown;
}
