// Array versions of the vector functions, for tests/native/simd_test.cc. Arrays hold 16 values.

void TestExp(const float* in, float* out) {
  Store(out, Exp(Load(in)));
}
void TestExpm1(const float* in, float* out) {
  Store(out, Expm1(Load(in)));
}
void TestLog(const float* in, float* out) {
  Store(out, Log(Load(in)));
}
void TestTanh(const float* in, float* out) {
  Store(out, Tanh(Load(in)));
}
void TestSigmoid(const float* in, float* out) {
  Store(out, Sigmoid(Load(in)));
}
void TestExp2Fast(const float* in, float* out) {
  Store(out, Exp2Fast(Load(in)));
}

void TestHalf(const uint16_t* in, float* wide, uint16_t* back) {
  const F value = Load(reinterpret_cast<const f16*>(in));
  Store(wide, value);
  Store(reinterpret_cast<f16*>(back), value);
}

void TestNarrow(const float* in, uint16_t* half, uint16_t* brain) {
  Store(reinterpret_cast<f16*>(half), Load(in));
  Store(reinterpret_cast<bf16*>(brain), Load(in));
}
