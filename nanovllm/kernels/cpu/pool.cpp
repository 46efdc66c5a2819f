#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nanovllm {
namespace {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr auto kWorkerSpin = std::chrono::microseconds(100);  // between two jobs of one step
constexpr auto kCallerSpin = std::chrono::microseconds(50);   // for the last chunk of a worker

// Spins until `ready` holds or the time is over; tells whether it held.
template <class Ready>
bool spin(std::chrono::microseconds limit, Ready ready) {
  auto end = std::chrono::steady_clock::now() + limit;
  do {
    for (int i = 0; i < 32; i++) {
      if (ready()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

class Pool {
 public:
  explicit Pool(int size) {
    for (int i = 1; i < size; i++) std::thread([this] { work(); }).detach();
  }

  // Runs the job if no other caller is using the pool; throws if a chunk ran out of memory.
  bool try_run(int num_chunks, ChunkFunction function, void* context) {
    if (!caller_.try_lock()) return false;
    function_ = function;
    context_ = context;
    num_chunks_ = num_chunks;
    next_chunk_.store(0, std::memory_order_relaxed);
    open();
    take_chunks();
    close();
    bool failed = failed_.exchange(false, std::memory_order_relaxed);
    caller_.unlock();
    if (failed) throw std::bad_alloc();
    return true;
  }

 private:
  // state_ = job number * kJob + kOpen while workers may join + the number of workers inside.
  static constexpr uint64_t kOpen = 1 << 16;
  static constexpr uint64_t kJob = 1 << 17;
  static constexpr uint64_t kInside = kOpen - 1;

  void open() {
    uint64_t job = state_.load(std::memory_order_relaxed) / kJob + 1;
    state_.store(job * kJob + kOpen, std::memory_order_seq_cst);
    if (num_sleeping_.load(std::memory_order_seq_cst) > 0) {
      { std::lock_guard<std::mutex> lock(sleep_); }
      job_opened_.notify_all();
    }
  }

  void close() {
    // Sequentially consistent, so that it is not read before caller_sleeps_ is written.
    auto empty = [this] { return (state_.load(std::memory_order_seq_cst) & kInside) == 0; };
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    if (spin(kCallerSpin, empty)) return;
    std::unique_lock<std::mutex> lock(sleep_);
    caller_sleeps_.store(true, std::memory_order_seq_cst);
    job_left_.wait(lock, empty);
    caller_sleeps_.store(false, std::memory_order_relaxed);
  }

  bool join(uint64_t job) {
    uint64_t state = state_.load(std::memory_order_acquire);
    while (state / kJob == job && (state & kOpen)) {
      if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) return true;
    }
    return false;
  }

  void leave() {
    state_.fetch_sub(1, std::memory_order_seq_cst);
    if (caller_sleeps_.load(std::memory_order_seq_cst)) {
      { std::lock_guard<std::mutex> lock(sleep_); }
      job_left_.notify_one();
    }
  }

  void take_chunks() {
    for (;;) {
      int chunk = next_chunk_.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= num_chunks_) return;
      try {
        function_(context_, chunk);
      } catch (const std::bad_alloc&) {  // out of a worker it would end the process
        failed_.store(true, std::memory_order_relaxed);
      }
    }
  }

  void work() {
    for (uint64_t done = 0;;) {
      done = wait_for_job_after(done);
      if (!join(done)) continue;
      take_chunks();
      leave();
    }
  }

  uint64_t wait_for_job_after(uint64_t done) {
    auto job = [this] { return state_.load(std::memory_order_seq_cst) / kJob; };
    if (!spin(kWorkerSpin, [&] { return job() != done; })) {
      std::unique_lock<std::mutex> lock(sleep_);
      num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
      job_opened_.wait(lock, [&] { return job() != done; });
      num_sleeping_.fetch_sub(1, std::memory_order_relaxed);
    }
    return job();
  }

  std::mutex caller_;  // held by the thread whose job it is
  ChunkFunction function_ = nullptr;
  void* context_ = nullptr;
  int num_chunks_ = 0;
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int> next_chunk_{0};
  alignas(64) std::atomic<int> num_sleeping_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> failed_{false};  // a chunk ran out of memory
  std::mutex sleep_;
  std::condition_variable job_opened_;
  std::condition_variable job_left_;
};

int size = 1;
std::atomic<Pool*> pool{nullptr};  // never destroyed: its threads may outlive main
std::atomic<bool> forked{false};   // the threads of `pool` stayed in the parent process

void* aligned(unsigned long bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes) != 0) throw std::bad_alloc();
  return memory;
}

struct Buffer {
  void* memory = nullptr;
  unsigned long bytes = 0;
  ~Buffer() { std::free(memory); }
};

}  // namespace

int num_threads() { return size; }

void run_chunks(int num_chunks, ChunkFunction function, void* context) {
  if (forked.load(std::memory_order_relaxed) && forked.exchange(false)) pool.store(new Pool(size));
  Pool* current = pool.load(std::memory_order_acquire);
  if (current != nullptr && current->try_run(num_chunks, function, context)) return;
  for (int chunk = 0; chunk < num_chunks; chunk++) function(context, chunk);
}

void* scratch(Slot slot, unsigned long bytes) {
  static thread_local Buffer buffers[3];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.bytes < bytes) {
    std::free(buffer.memory);
    buffer.memory = nullptr;
    buffer.bytes = 0;
    buffer.memory = aligned(bytes);
    buffer.bytes = bytes;
  }
  return buffer.memory;
}

// Starts the pool; a second call with another size replaces it. The child of a fork has none of
// its parent's threads and so starts a pool of its own when it first needs one.
extern "C" void nanovllm_start(int threads) {
  static std::once_flag once;
  std::call_once(once, [] {
    pthread_atfork(nullptr, nullptr, [] {
      pool.store(nullptr);
      forked.store(size > 1);
    });
  });
  if (threads == size) return;
  size = threads;
  pool.store(threads > 1 ? new Pool(threads) : nullptr, std::memory_order_release);
}

}  // namespace nanovllm
