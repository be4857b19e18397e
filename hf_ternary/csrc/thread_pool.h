// Threads that share the tasks of one call.
//
// How: the caller publishes a job, works on it like any worker, and when no task is left waits only for workers that really
// joined; one that the operating system has not woken yet is not waited for. Workers spin for a moment after a job (the next
// layer follows within microseconds), then sleep.
// Concurrent callers: the pool serves one at a time, the others do their tasks alone. Fork: the child starts a new pool.
// Trade-off: while it spins, an idle worker takes a core from others for kSpin.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <type_traits>

namespace hf_ternary {

class ThreadPool {
 public:
  static ThreadPool& instance();

  // Calls work(task, thread) for every task in [0, tasks), on at most `threads` threads numbered from 0 (the caller).
  // `work` must not throw.
  template <class Work>
  void run(int threads, std::int64_t tasks, Work&& work) {
    using Plain = std::remove_reference_t<Work>;
    run(threads, tasks, [](void* w, std::int64_t task, int thread) { (*static_cast<Plain*>(w))(task, thread); }, &work);
  }

 private:
  using Function = void (*)(void* work, std::int64_t task, int thread);

  void run(int threads, std::int64_t tasks, Function function, void* work);
  void grow(int workers);
  void serve(int thread);
  bool join();
  void do_tasks(int thread);
  std::uint64_t wait_for_job(std::uint64_t seen);

  std::mutex busy_;  // held by the caller whose job runs
  int workers_ = 0;

  // The job. Written by the caller while no worker is joined.
  Function function_ = nullptr;
  void* work_ = nullptr;
  std::int64_t tasks_ = 0;
  int threads_ = 0;
  std::atomic<std::int64_t> next_{0};
  std::atomic<int> joined_{kClosed};  // workers at work on the job, or kClosed when none may join
  std::atomic<std::uint64_t> job_{0};

  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleeping_{0};

  static constexpr int kClosed = -1;
};

}  // namespace hf_ternary
