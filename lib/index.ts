export { DTYPE_SIZE, DTYPES, type DType } from './dtype.ts';
export {
  AddonLoadError,
  ArgumentError,
  DisposedError,
  DTypeError,
  InternalError,
  OutOfMemoryError,
  ShapeError,
  VlmGrpoError,
  type VlmGrpoErrorCode,
} from './errors.ts';
export type { MemoryStats } from './native/addon.ts';
export * from './ops/index.ts';
export {
  type Device,
  emptyCache,
  memoryStats,
  Tensor,
  type TensorOptions,
  tidy,
} from './tensor.ts';
export { version } from './version.ts';
