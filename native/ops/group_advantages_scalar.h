// group_advantages_math.h for plain doubles. Include it inside a namespace, after simd_levels.h.

inline double Select(bool mask, double a, double b) {
  return mask ? a : b;
}
inline double Max(double a, double b) {
  return a > b ? a : b;
}
inline double Sqrt(double x) {
  return std::sqrt(x);
}
inline double ExponentOf(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= 0x7ff0000000000000u;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

#include "native/ops/group_advantages_math.h"
