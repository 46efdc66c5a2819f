// Memory for packed weights: many weights share a region of huge pages, because a stream through
// small pages is slower (it misses the translation cache, and prefetchers stop where a page ends).
#pragma once

namespace nanovllm {

struct Region;

// `bytes` of memory aligned to a cache line, and the region it is part of; null without memory.
char* allocate_weight(long bytes, Region** region);

// Gives back one allocation; a region is freed with the last of its allocations.
void free_weight(Region* region);

}  // namespace nanovllm
