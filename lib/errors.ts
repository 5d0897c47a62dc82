/** Error classes of the package. Each has a stable `code` to branch on; the text is for people. */

export type VlmGrpoErrorCode =
  | 'INVALID_ARGUMENT'
  | 'SHAPE'
  | 'DTYPE'
  | 'DISPOSED'
  | 'OUT_OF_MEMORY'
  | 'ADDON_LOAD'
  | 'INTERNAL';

/** Base class: `error instanceof VlmGrpoError` is true for everything the package throws itself. */
export class VlmGrpoError extends Error {
  readonly code: VlmGrpoErrorCode;

  constructor(code: VlmGrpoErrorCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.code = code;
    this.name = new.target.name;
  }
}

/** A value or option an op cannot accept. */
export class ArgumentError extends VlmGrpoError {
  constructor(message: string, options?: ErrorOptions) {
    super('INVALID_ARGUMENT', message, options);
  }
}

/** An input whose shape does not fit the others. */
export class ShapeError extends VlmGrpoError {
  constructor(message: string) {
    super('SHAPE', message);
  }
}

/** An input stored in a type the op cannot read. */
export class DTypeError extends VlmGrpoError {
  constructor(message: string) {
    super('DTYPE', message);
  }
}

/** A tensor used after `dispose()`. */
export class DisposedError extends VlmGrpoError {
  constructor(message: string) {
    super('DISPOSED', message);
  }
}

/** Native memory that could not be had. */
export class OutOfMemoryError extends VlmGrpoError {
  constructor(message: string, options?: ErrorOptions) {
    super('OUT_OF_MEMORY', message, options);
  }
}

/** The native addon could not be loaded; the message lists every path tried and why it failed. */
export class AddonLoadError extends VlmGrpoError {
  constructor(message: string, options?: ErrorOptions) {
    super('ADDON_LOAD', message, options);
  }
}

/** A fault of the package itself. */
export class InternalError extends VlmGrpoError {
  constructor(message: string, options?: ErrorOptions) {
    super('INTERNAL', message, options);
  }
}

/**
 * What native texts call an argument, where the public option is not just its name in camelCase:
 * the C parameters of policy_loss and TRL's words for them.
 */
const PUBLIC_NAMES: Readonly<Record<string, string>> = {
  horizon: 'maxCompletionLength',
  off_policy_threshold: 'offPolicyMaskThreshold',
  reject_high: 'rolloutReject.high',
  reject_low: 'rolloutReject.low',
  rollout_level: 'rolloutCorrection',
  rollout_max: 'rolloutClipMax',
  rollout_min: 'rolloutClipMin',
};

function publicNames(text: string): string {
  return text.replace(
    /`([a-z0-9_]+)`/g,
    (_, name: string) =>
      `\`${PUBLIC_NAMES[name] ?? name.replace(/_(.)/g, (_match, letter: string) => letter.toUpperCase())}\``,
  );
}

/**
 * The class that fits an error thrown by the addon, with the caller's stack: `at` is captured
 * before crossing into native code, where no JavaScript stack exists any more.
 */
export function fromNative(error: unknown, at?: Error): Error {
  if (!(error instanceof Error) || !('code' in error)) {
    return error instanceof Error ? error : new InternalError(String(error));
  }
  const options = { cause: error };
  const message = publicNames(error.message);
  let converted: VlmGrpoError;
  switch (error.code) {
    case 'INVALID_ARGUMENT':
      converted = new ArgumentError(message, options);
      break;
    case 'OUT_OF_MEMORY':
      converted = new OutOfMemoryError(message, options);
      break;
    default:
      converted = new InternalError(message, options);
  }
  if (at?.stack !== undefined) {
    converted.stack = `${converted.name}: ${converted.message}\n${at.stack.split('\n').slice(1).join('\n')}`;
  }
  return converted;
}

/** How a value reads in a message: `[2, 3]`, `Float32Array(6)`, `"abc"`, `undefined`. */
export function describe(value: unknown): string {
  if (Array.isArray(value)) return `[${value.join(', ')}]`;
  if (ArrayBuffer.isView(value)) {
    return `${value.constructor.name}(${(value as unknown as { length?: number }).length ?? value.byteLength})`;
  }
  if (typeof value === 'string') return JSON.stringify(value);
  if (typeof value === 'object' && value !== null) return value.constructor?.name ?? 'object';
  return String(value);
}
