// What rnnkern asks of cuBLAS, on the host: products of matrices of columns, as the BLAS has them,
// and the mode of a handle, which is an int here. With TF32 the factors have 10 bits of mantissa.
#include <cstdint>
#include <cstring>

namespace {

constexpr int kOk = 0, kInvalidValue = 7;
constexpr int kDefaultMath = 0, kTf32Math = 3;

int fail_with = kOk;
long products[2];  // exact, TF32

float factor(float x, bool tf32) {
  if (!tf32) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + (1u << 12)) & ~((1u << 13) - 1);
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

int most(int a, int b) { return a < b ? b : a; }

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int cublasSetMathMode(int* handle, int mode) {
  if (mode != kDefaultMath && mode != kTf32Math) return kInvalidValue;
  *handle = mode;
  return kOk;
}

// C [m,n] = alpha op(A) [m,k] op(B) [k,n] + beta C, which is not read where beta is 0.
int cublasSgemm_v2(int* handle, int transa, int transb, int m, int n, int k, const float* alpha,
                   const float* A, int lda, const float* B, int ldb, const float* beta, float* C,
                   int ldc) {
  if (fail_with != kOk) return fail_with;
  const bool valid = m >= 0 && n >= 0 && k >= 0 && lda >= most(1, transa ? k : m) &&
                     ldb >= most(1, transb ? n : k) && ldc >= most(1, m);
  if (!valid) return kInvalidValue;
  const bool tf32 = *handle == kTf32Math;
  ++products[tf32];
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) {
        const float a = A[transa ? i * lda + l : l * lda + i];
        const float b = B[transb ? l * ldb + j : j * ldb + l];
        sum += static_cast<double>(factor(a, tf32)) * factor(b, tf32);
      }
      float& c = C[j * ldc + i];
      const float before = *beta == 0 ? 0 : *beta * c;
      c = static_cast<float>(*alpha * sum) + before;
    }
  }
  return kOk;
}

// Lets every product fail with a status from now on; 0: none.
void cublas_host_fail(int status) { fail_with = status; }
// Products so far, with TF32 or without.
long cublas_host_products(int tf32) { return products[tf32]; }
}  // extern "C"
#pragma GCC visibility pop
