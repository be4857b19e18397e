// Working memory of a call: one allocation a calling thread, kept for its next calls unless it is very large.
#pragma once

#include <cstdint>
#include <memory>

#include "aligned_buffer.h"
#include "kernel.h"

namespace hf_ternary {

// Carves arrays out of the calling thread's own memory, which later calls use again.
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes) {
    thread_local AlignedBuffer<std::uint8_t> kept;
    if (bytes > kKept) own_ = std::make_shared<AlignedBuffer<std::uint8_t>>(bytes);
    next_ = own_ ? own_->data() : kept.reserve(bytes);
  }
  // Takes nothing but counts: carve from it, then ask for `taken()`.
  static Scratch measure() { return Scratch(); }
  std::int64_t taken() const { return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(next_)); }

  Scratch skip(std::int64_t bytes) const {
    Scratch later = *this;
    later.next_ += bytes;
    return later;
  }
  template <class T>
  T* take(std::int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += size<T>(count);
    return taken;
  }
  template <class T>
  static std::int64_t size(std::int64_t count) {
    return (count * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  static constexpr std::int64_t kKept = std::int64_t{256} << 20;

  Scratch() = default;

  std::shared_ptr<AlignedBuffer<std::uint8_t>> own_;
  std::uint8_t* next_ = nullptr;
};

inline std::int64_t rows_size(const WeightView& w, std::int64_t rows) {
  return Scratch::size<std::int8_t>(rows * w.padded_inputs()) + Scratch::size<std::int32_t>(rows * w.groups) +
         Scratch::size<float>(rows);
}

inline QuantizedRows take_rows(Scratch& scratch, const WeightView& w, std::int64_t rows) {
  return {scratch.take<std::int8_t>(rows * w.padded_inputs()), scratch.take<std::int32_t>(rows * w.groups),
          scratch.take<float>(rows)};
}

}  // namespace hf_ternary
