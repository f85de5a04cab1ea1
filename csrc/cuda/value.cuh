// Value<A>: what a cell computes with on CUDA, one scalar of the accumulation type A, which is
// float for 16-bit and float data and double for double. It is a class so that the functions below
// are found from the cell headers.
#pragma once

#include "core/accumulator.h"
#include "core/host_device.h"
#include "cuda/intrinsics.cuh"

namespace rnnkern {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T narrow(Accumulator<T> x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <class A>
struct Value {
  A v;

  Value() = default;
  RNNKERN_HD explicit Value(A scalar) : v(scalar) {}

  RNNKERN_HD friend Value operator+(Value a, Value b) { return Value(a.v + b.v); }
  RNNKERN_HD friend Value operator-(Value a, Value b) { return Value(a.v - b.v); }
  RNNKERN_HD friend Value operator*(Value a, Value b) { return Value(a.v * b.v); }
  RNNKERN_HD friend Value operator/(Value a, Value b) { return Value(a.v / b.v); }
};

// a·b + c, rounded once. The build lets nvcc fuse nothing else (-fmad=false): what
// it fuses may differ between two instantiations of one template, which must agree bit for bit.
RNNKERN_HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
RNNKERN_HD double fma(double a, double b, double c) { return ::fma(a, b, c); }
template <class A>
RNNKERN_HD Value<A> fma(Value<A> a, Value<A> b, Value<A> c) {
  return Value<A>(fma(a.v, b.v, c.v));
}
RNNKERN_HD Value<float> tanh(Value<float> x) { return Value<float>(::tanhf(x.v)); }
RNNKERN_HD Value<double> tanh(Value<double> x) { return Value<double>(::tanh(x.v)); }
RNNKERN_HD Value<float> sigmoid(Value<float> x) {
  return Value<float>(1.0f / (1.0f + ::expf(-x.v)));
}
RNNKERN_HD Value<double> sigmoid(Value<double> x) {
  return Value<double>(1.0 / (1.0 + ::exp(-x.v)));
}

// Comparisons with NaN are false, so NaN passes.
template <class A>
RNNKERN_HD Value<A> relu(Value<A> x) {
  return Value<A>(x.v <= A(0) ? A(0) : x.v);
}
template <class A>
RNNKERN_HD Value<A> where_positive(Value<A> a, Value<A> d) {
  return Value<A>(a.v <= A(0) ? A(0) : d.v);
}

}  // namespace rnnkern
