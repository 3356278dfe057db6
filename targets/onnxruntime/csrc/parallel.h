// How compute kernels use several threads without knowing whose they are, and memory that each thread keeps.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <new>

namespace h1 {

// parallel(count, body) runs body(0) ... body(count - 1) on any threads in any order and returns when all are done.
// Items are handed out one by one, so several items a thread balance themselves; one item runs on the calling thread.
using Parallel = std::function<void(size_t count, const std::function<void(size_t)>& body)>;

// As parallel, for body(begin, end) over pieces of [0, total) of `grain` elements (the last one shorter).
template <class Body>
void parallel_ranges(const Parallel& parallel, size_t total, size_t grain, const Body& body) {
  parallel((total + grain - 1) / grain,
           [&](size_t piece) { body(piece * grain, std::min(total, (piece + 1) * grain)); });
}

// Memory that grows and is kept, aligned for vectors. Make it `static thread_local`: one for each thread and place in
// the code.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  // At least `count` elements, with whatever values the last use left. Throws std::bad_alloc where there is no room.
  T* get(size_t count) {
    if (kExact || count > count_) {
      if (count > SIZE_MAX / 2 / sizeof(T)) throw std::bad_alloc();
      release();
      data_ = static_cast<T*>(::operator new(count * sizeof(T), kAlignment));
      count_ = count;
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
#if defined(H1_EXACT_SCRATCH)  // for a sanitizer, which sees what is read behind the last element
  static constexpr bool kExact = true;
#else
  static constexpr bool kExact = false;
#endif

  void release() {
    ::operator delete(data_, kAlignment);
    data_ = nullptr;
    count_ = 0;
  }

  T* data_ = nullptr;
  size_t count_ = 0;
};

}  // namespace h1
