#include "thread_pool.h"

#include <algorithm>
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
std::atomic<const ThreadPool::OpenMp*> openmp{nullptr};
bool forked = false;  // an OpenMP runtime may wait forever for threads that only the parent has

}  // namespace

ThreadPool& ThreadPool::instance() {
  static const bool created = [] {
    pool = new ThreadPool;
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, [] {  // threads, OpenMP's too, exist only in the parent
      pool = new ThreadPool;
      openmp = nullptr;
      forked = true;
    });
#endif
    return true;
  }();
  static_cast<void>(created);
  return *pool.load();
}

void ThreadPool::share(OpenMp runtime) {
  instance();  // sees to it that a fork ends the sharing
  if (!forked) openmp = runtime.parallel ? new OpenMp(runtime) : nullptr;
}

void ThreadPool::Job::start(int threads, std::int64_t tasks, decltype(function) function, void* work) {
  this->function = function;
  this->work = work;
  this->tasks = tasks;
  this->threads = threads;
  for (int t = 0; t < threads; ++t) next[t] = tasks * t / threads;
}

void ThreadPool::Job::help(int thread) {
  for (int i = 0; i < threads; ++i) {
    const int owner = (thread + i) % threads;
    const std::int64_t end = tasks * (owner + 1) / threads;
    for (std::int64_t task; (task = next[owner].fetch_add(1)) < end;) function(work, task, thread);
  }
}

void ThreadPool::run(int threads, std::int64_t tasks, decltype(Job::function) function, void* work) {
  threads = static_cast<int>(std::min<std::int64_t>({threads, tasks, kMaxThreads}));
  if (const OpenMp* runtime = openmp; threads > 1 && runtime) {
    Job job;
    job.start(threads, tasks, function, work);
    struct Shared {
      Job* job;
      int (*thread_number)();
    } shared{&job, runtime->thread_number};
    runtime->parallel(
        [](void* argument) {
          const Shared& shared = *static_cast<Shared*>(argument);
          shared.job->help(shared.thread_number());
        },
        &shared, static_cast<unsigned>(threads), 0);
    return;
  }
  std::unique_lock<std::mutex> mine(busy_, std::defer_lock);
  if (threads <= 1 || !mine.try_lock()) {
    for (std::int64_t task = 0; task < tasks; ++task) function(work, task, 0);
    return;
  }
  grow(threads - 1);
  job_.start(threads, tasks, function, work);
  joined_ = 0;
  ++jobs_;
  if (sleeping_ > 0) {
    std::lock_guard<std::mutex> lock(sleep_);
    wake_.notify_all();
  }
  job_.help(0);
  for (int none = 0, turns = 0; !joined_.compare_exchange_weak(none, kClosed); none = 0) {
    if (++turns < 1000) pause();
    else std::this_thread::yield();  // the worker may need this core
  }
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
    if (thread < job_.threads) job_.help(thread);
    --joined_;
  }
}

bool ThreadPool::join() {
  for (int joined = joined_; joined != kClosed;) {
    if (joined_.compare_exchange_weak(joined, joined + 1)) return true;
  }
  return false;
}

std::uint64_t ThreadPool::wait_for_job(std::uint64_t seen) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i, pause()) {
      if (jobs_ != seen) return jobs_;
    }
  } while (std::chrono::steady_clock::now() < end);
  std::unique_lock<std::mutex> lock(sleep_);
  ++sleeping_;
  wake_.wait(lock, [&] { return jobs_ != seen; });
  --sleeping_;
  return jobs_;
}

}  // namespace hf_ternary
