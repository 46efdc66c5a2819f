// A pool of threads that shares the chunks of one job. Knows nothing of what a chunk computes.
//
// The caller works too and never waits for a thread that has not begun a chunk, so a busy machine
// costs speed and no more. A second caller, or the child of a fork, finds no free pool and runs
// its chunks itself: same results, one thread.
#pragma once

#include <new>

namespace nanovllm {

using ChunkFunction = void (*)(void* context, int chunk);

void run_chunks(int num_chunks, ChunkFunction function, void* context);

// The threads that work on a job, the caller's own included.
int num_threads();

// Calls body(chunk) once for every chunk in [0, num_chunks), in any order and on any thread. A
// std::bad_alloc of one is thrown when all are done.
template <class Body>
void parallel_for(int num_chunks, const Body& body) {
  if (num_chunks == 1) return body(0);
  auto call = [](void* context, int chunk) { (*static_cast<const Body*>(context))(chunk); };
  run_chunks(num_chunks, call, const_cast<Body*>(&body));
}

// A buffer of this thread, at least `bytes` long, aligned to a cache line; `slot` tells the
// buffers of one thread apart. The contents are lost at the next call with the same slot. Throws
// std::bad_alloc without memory.
enum class Slot { kActivations, kTile, kForward };
void* scratch(Slot slot, unsigned long bytes);

// What `body` returns, or `failed` where memory ran out: no exception may reach Python's side.
template <class Result, class Body>
Result unless_out_of_memory(Result failed, const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return failed;
  }
}

}  // namespace nanovllm
