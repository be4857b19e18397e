// Threads that share the tasks of one call.
//
// How: every thread starts with its own run of tasks, so that in repeated calls the same memory stays in the same core's cache,
// then takes what others have left. The caller works like any other thread, and when no task is left waits only for workers
// that really joined; one that the operating system has not woken yet is not waited for. Workers spin for a moment after a
// job (the next layer follows within microseconds), then sleep.
// Concurrent callers: the pool serves one at a time, the others do their tasks alone. Fork: the child starts a new pool.
// Trade-off: while it spins, an idle worker takes a core from others for kSpin. OpenMP's threads do the same to us, and for
// milliseconds: beside torch, which uses them between two layers, the tasks go to torch's OpenMP threads instead.
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

  // The two entry points of libgomp, and of all runtimes that stand in for it, that are needed.
  struct OpenMp {
    void (*parallel)(void (*body)(void*), void* argument, unsigned threads, unsigned flags);  // GOMP_parallel
    int (*thread_number)();                                                                   // omp_get_thread_num
  };

  // From now on, and until a fork, use the threads of this OpenMP runtime.
  static void share(OpenMp openmp);

  // Calls work(task, thread) for every task in [0, tasks), on at most `threads` threads numbered from 0 (the caller).
  // `work` must not throw.
  template <class Work>
  void run(int threads, std::int64_t tasks, Work&& work) {
    using Plain = std::remove_reference_t<Work>;
    run(threads, tasks, [](void* w, std::int64_t task, int thread) { (*static_cast<Plain*>(w))(task, thread); }, &work);
  }

 private:
  static constexpr int kMaxThreads = 256;
  static constexpr int kClosed = -1;

  struct Job {
    void (*function)(void* work, std::int64_t task, int thread);
    void* work;
    std::int64_t tasks;
    int threads;
    std::atomic<std::int64_t> next[kMaxThreads];  // of each thread's own run of tasks

    void start(int threads, std::int64_t tasks, decltype(function) function, void* work);
    void help(int thread);
  };

  void run(int threads, std::int64_t tasks, decltype(Job::function) function, void* work);
  void grow(int workers);
  void serve(int thread);
  bool join();
  std::uint64_t wait_for_job(std::uint64_t seen);

  std::mutex busy_;  // held by the caller whose job runs
  int workers_ = 0;
  Job job_;                           // written by the caller while no worker is joined
  std::atomic<int> joined_{kClosed};  // workers at work on the job, or kClosed when none may join
  std::atomic<std::uint64_t> jobs_{0};

  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleeping_{0};
};

}  // namespace hf_ternary
