// How the work is split: many rows are cut into chunks that a thread quantizes and multiplies on its own, activations staying
// in its L2 cache; few rows are quantized by the caller and the outputs are cut instead, so that one row uses all threads.
#include "linear.h"

#include <algorithm>

#include "scratch.h"
#include "thread_pool.h"

namespace hf_ternary {
namespace {

constexpr std::int64_t kChunkBytes = 256 << 10;    // int8 activations of one chunk of rows
constexpr std::int64_t kStreamBytes = 2 << 20;     // outputs larger than this are written past the caches
constexpr std::int64_t kWorkPerThread = 2 << 20;   // multiply-adds that take about as long as waking a thread

}  // namespace

void linear(const PackedWeight& weight, const float* x, std::int64_t rows, const float* bias, float* y, int threads) {
  const Kernel& kernel = weight.kernel();
  const WeightView& w = weight.view();
  const std::int64_t strip_bytes = kernel.strip_width() * w.padded_inputs(), strips = weight.strips();
  if (rows == 0 || strips == 0) return;
  const std::int64_t worthwhile = rows * strips * strip_bytes / kWorkPerThread;
  threads = static_cast<int>(std::clamp<std::int64_t>(worthwhile, 1, std::max(threads, 1)));

  const bool stream = rows * w.outputs * static_cast<std::int64_t>(sizeof(float)) > kStreamBytes;

  if (rows >= std::int64_t{threads} * kernel.rows || threads == 1) {
    const std::int64_t fit = std::max<std::int64_t>(kChunkBytes / std::max<std::int64_t>(w.padded_inputs(), 1), 1);
    const std::int64_t chunks = std::min(ceil_div(ceil_div(rows, fit), threads) * threads, rows);
    const std::int64_t chunk_rows = ceil_div(rows, chunks);
    const std::int64_t bytes = rows_size(w, chunk_rows) + Scratch::size<std::uint8_t>(strip_bytes);
    const Scratch memory(bytes * threads);
    ThreadPool::instance().run(threads, chunks, [&](std::int64_t chunk, int thread) {
      Scratch scratch = memory;
      scratch.take<std::uint8_t>(bytes * thread);
      const QuantizedRows q = take_rows(scratch, w, chunk_rows);
      const std::int64_t begin = rows * chunk / chunks, count = rows * (chunk + 1) / chunks - begin;
      kernel.quantize(w, x + begin * w.inputs, count, q);
      kernel.multiply(w, q, count, 0, strips, {y + begin * w.outputs, bias, stream},
                      scratch.take<std::uint8_t>(strip_bytes));
    });
    return;
  }

  const std::int64_t parts = std::min<std::int64_t>(threads, strips);
  const std::int64_t unpacked = Scratch::size<std::uint8_t>(strip_bytes);
  Scratch scratch(rows_size(w, rows) + unpacked * threads);
  const QuantizedRows q = take_rows(scratch, w, rows);
  std::uint8_t* const unpack = scratch.take<std::uint8_t>(unpacked * threads);
  kernel.quantize(w, x, rows, q);
  ThreadPool::instance().run(threads, parts, [&](std::int64_t part, int thread) {
    kernel.multiply(w, q, rows, strips * part / parts, strips * (part + 1) / parts, {y, bias, stream},
                    unpack + unpacked * thread);
  });
}

}  // namespace hf_ternary
