#include "thread_pool.h"

#include <chrono>
#include <system_error>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace hf_ternary {
namespace {

constexpr std::chrono::microseconds kSpin{100};

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  asm volatile("yield");
#endif
}

// Never destroyed: its threads may outlive every destructor of the process.
std::atomic<ThreadPool*> pool{nullptr};

}  // namespace

ThreadPool& ThreadPool::instance() {
  static const bool created = [] {
    pool = new ThreadPool;
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, [] { pool = new ThreadPool; });  // the old one's threads exist only in the parent
#endif
    return true;
  }();
  static_cast<void>(created);
  return *pool.load();
}

void ThreadPool::run(int threads, std::int64_t tasks, Function function, void* work) {
  std::unique_lock<std::mutex> mine(busy_, std::defer_lock);
  if (threads <= 1 || tasks <= 1 || !mine.try_lock()) {
    for (std::int64_t task = 0; task < tasks; ++task) function(work, task, 0);
    return;
  }
  grow(threads - 1);
  function_ = function;
  work_ = work;
  tasks_ = tasks;
  threads_ = threads;
  next_ = 0;
  joined_ = 0;
  ++job_;
  if (sleeping_ > 0) {
    std::lock_guard<std::mutex> lock(sleep_);
    wake_.notify_all();
  }
  do_tasks(0);
  for (int none = 0; !joined_.compare_exchange_weak(none, kClosed); none = 0) pause();
}

void ThreadPool::grow(int workers) {
  try {
    while (workers_ < workers) {
      std::thread(&ThreadPool::serve, this, workers_ + 1).detach();
      ++workers_;
    }
  } catch (const std::system_error&) {
    // The process may not have more threads; those that exist do the work.
  }
}

void ThreadPool::serve(int thread) {
  for (std::uint64_t seen = 0;;) {
    seen = wait_for_job(seen);
    if (!join()) continue;
    if (thread < threads_) do_tasks(thread);
    --joined_;
  }
}

bool ThreadPool::join() {
  for (int joined = joined_; joined != kClosed;) {
    if (joined_.compare_exchange_weak(joined, joined + 1)) return true;
  }
  return false;
}

void ThreadPool::do_tasks(int thread) {
  for (std::int64_t task; (task = next_.fetch_add(1)) < tasks_;) function_(work_, task, thread);
}

std::uint64_t ThreadPool::wait_for_job(std::uint64_t seen) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i, pause()) {
      if (job_ != seen) return job_;
    }
  } while (std::chrono::steady_clock::now() < end);
  std::unique_lock<std::mutex> lock(sleep_);
  ++sleeping_;
  wake_.wait(lock, [&] { return job_ != seen; });
  --sleeping_;
  return job_;
}

}  // namespace hf_ternary
