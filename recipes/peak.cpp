// How many int8 multiply-adds a second AVX-512 VNNI can do on this machine: prints G/s, the best of 9 tries.
// Each thread runs independent vpdpbusd on registers, so neither memory nor latency is in the way.
//   c++ -O2 -mavx512f -mavx512vnni -pthread peak.cpp -o peak && ./peak THREADS
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

constexpr int kLoops = 10'000'000, kRegisters = 16, kLanes = 64;

void work() {
  __m512i sums[kRegisters] = {};
  const __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(1);
  for (int loop = 0; loop < kLoops; ++loop) {
#pragma GCC unroll 16
    for (auto& sum : sums) {
      sum = _mm512_dpbusd_epi32(sum, a, b);
      asm volatile("" : "+v"(sum));  // keeps the compiler from working it out
    }
  }
}

int main(int argc, char** argv) {
  if (argc != 2 || !__builtin_cpu_supports("avx512vnni")) return 1;
  const int threads = std::atoi(argv[1]);
  double best = 0;
  for (int turn = 0; turn < 9; ++turn) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) pool.emplace_back(work);
    for (auto& thread : pool) thread.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, double(threads) * kLoops * kRegisters * kLanes / seconds.count() / 1e9);
  }
  std::printf("%.1f\n", best);
}
