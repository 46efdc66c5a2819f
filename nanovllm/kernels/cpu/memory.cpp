#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>

namespace nanovllm {

struct Region {
  char* base;
  long size, used;
  long num_live;  // allocations not yet given back, and one more while it is the current region
};

namespace {

constexpr long kHugePage = 2 << 20;
constexpr long kRegionBytes = 64 << 20;  // pages never written to take no memory

std::mutex mutex;
Region* current = nullptr;

long round_up(long bytes, long unit) { return (bytes + unit - 1) / unit * unit; }

Region* new_region(long bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kHugePage, bytes) != 0) return nullptr;
#if defined(MADV_HUGEPAGE)
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return new Region{static_cast<char*>(memory), bytes, 0, 1};
}

void release(Region* region) {
  if (--region->num_live > 0) return;
  std::free(region->base);
  delete region;
}

}  // namespace

char* allocate_weight(long bytes, Region** region) {
  std::lock_guard<std::mutex> lock(mutex);
  bytes = round_up(bytes, 64);
  if (current == nullptr || current->size - current->used < bytes) {
    Region* fresh = new_region(std::max(kRegionBytes, round_up(bytes, kHugePage)));
    if (fresh == nullptr) return nullptr;
    if (current != nullptr) release(current);
    current = fresh;
  }
  *region = current;
  char* memory = current->base + current->used;
  current->used += bytes;
  current->num_live++;
  return memory;
}

void free_weight(Region* region) {
  std::lock_guard<std::mutex> lock(mutex);
  release(region);
}

// Asks for huge pages under memory that is yet to be written.
extern "C" void nanovllm_want_huge_pages(void* memory, long bytes) {
#if defined(MADV_HUGEPAGE)
  long page = sysconf(_SC_PAGESIZE);
  uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace nanovllm
