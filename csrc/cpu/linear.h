// The dense product out = a·wᵀ + b, with the tiles of the recurrence, for the products around it
// that torch's GEMMs serve badly: small ones, where the call costs more than the work, and float64,
// where MKL's last bits change with the number of threads. Threads split the output units, or the
// rows if there are more threads than panels; either way every element is summed alike.
#pragma once

#include "core/problem.h"
#include "cpu/weights.h"

namespace rnnkern {
namespace {

template <class T>
struct Linear {
  using W = Weights<T, 1>;

  // One packed panel a thread.
  static int64_t scratch_elements(const LinearProblem<T>& p, int threads) {
    return threads * W::size(p.K, 1);
  }

  static int64_t work_items(const LinearProblem<T>& p) {
    return maximum(W::panels(p.O), (p.N + W::MR - 1) / W::MR);
  }

  static void run(const LinearProblem<T>& p, T* scratch, int rank, int size) {
    const int64_t panels = W::panels(p.O);
    const bool split_units = panels >= size;
    const Range mine = split_units ? part(panels, rank, size) : Range{0, panels};
    const Range rows = split_units ? Range{0, p.N} : part(p.N, rank, size);
    if (rows.begin == rows.end) return;
    for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
      const int64_t unit = panel * W::units;
      const W w{p.K, minimum(W::units, p.O - unit), scratch + rank * W::size(p.K, 1)};
      w.pack_rows(p.w + unit * p.K, p.K, p.b ? p.b + unit : nullptr, 0, 1);
      run_product(
          w, p.a + rows.begin * p.K, p.K, rows.end - rows.begin, rows.end - rows.begin, {0, 1},
          [&](int64_t m, int64_t u, int n, const T* r) RNNKERN_LAMBDA {
            store(p.out + (rows.begin + m) * p.O + unit + u, Pack<T>::load(r), n);
          },
          FetchNothing{});
    }
  }
};

}  // namespace
}  // namespace rnnkern
