/* A block of GPU threads on one CPU thread: every GPU thread is a fiber that runs until it has to wait for another.
 *
 * For tests of kernels without a GPU: the kernels' own sources, compiled for the host. Orders that hardware leaves open
 * are chosen here, by the environment variable COSMOS_EMULATION, a list of words:
 *
 *     late      asynchronous copies and products take effect at the last allowed moment (default: the first)
 *     reverse   threads run from the last to the first (default: from the first)
 *     sm_90     the device has compute capability 9.0 (default: 8.0)
 *
 * Shared memory starts as NaN. Threads that wait for each other for ever end the program with a message.
 */
#ifndef COSMOS_EMULATION_FIBERS_H
#define COSMOS_EMULATION_FIBERS_H

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

namespace cosmos {
namespace emulation {

constexpr int kSharedBytes = 227 * 1024;
constexpr size_t kStackBytes = 64 * 1024;

inline bool mode(const char* word) {
  const char* words = std::getenv("COSMOS_EMULATION");
  return words != nullptr && std::strstr(words, word) != nullptr;
}

/* Threads that wait until `expected` of them have come; the last one to come does the work of all. */
struct Rendezvous {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  void* arguments[128] = {}; /* of each thread that takes part, by its place in the group */
};

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  unsigned index = 0;
  bool done = false;
  std::vector<Copy> open;                /* copies of the group not committed yet */
  std::vector<std::vector<Copy>> groups; /* committed, not complete, oldest first */
};

struct Warpgroup {
  Rendezvous all;
  std::vector<std::function<void()>> open;                /* products not committed yet */
  std::vector<std::vector<std::function<void()>>> groups; /* committed, not complete, oldest first */
};

struct Block {
  unsigned index = 0, grid = 0, threads = 0;
  std::vector<Fiber> fibers;
  Fiber* running = nullptr;
  ucontext_t scheduler;
  Rendezvous all;
  std::vector<Rendezvous> warps;
  std::vector<Warpgroup> warpgroups;
  Rendezvous named[16];
  bool late = false;
  uint64_t progress = 0; /* grows with everything that may free a waiting thread */
  std::function<void()> body;
};

inline Block* block = nullptr;
alignas(1024) inline unsigned char shared[kSharedBytes];

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulation: %s\n", message);
  std::abort();
}

inline void yield() {
  Fiber* self = block->running;
  swapcontext(&self->context, &block->scheduler);
}

/* Waits for the group; `work(arguments)` is called once, by the last thread, before any goes on. */
template <typename Work>
void meet(Rendezvous& group, int place, void* arguments, const Work& work) {
  group.arguments[place] = arguments;
  const uint64_t generation = group.generation;
  if (++group.arrived == group.expected) {
    work(group.arguments);
    group.arrived = 0;
    ++group.generation;
    ++block->progress;
    return;
  }
  while (group.generation == generation) yield();
}

inline void fiber_main() {
  block->body();
  block->running->done = true;
  ++block->progress;
  yield();
}

inline void run_block(unsigned index, unsigned grid, unsigned threads, const std::function<void()>& body) {
  Block own;
  block = &own;
  own.index = index;
  own.grid = grid;
  own.threads = threads;
  own.body = body;
  own.late = mode("late");
  own.fibers = std::vector<Fiber>(threads);
  own.all.expected = static_cast<int>(threads);
  own.warps.resize((threads + 31) / 32);
  for (Rendezvous& warp : own.warps) warp.expected = 32;
  own.warpgroups.resize((threads + 127) / 128);
  for (Warpgroup& warpgroup : own.warpgroups) warpgroup.all.expected = 128;
  std::memset(shared, 0xff, sizeof(shared)); /* NaN in every format */
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = own.fibers[i];
    fiber.index = i;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  const bool reverse = mode("reverse");
  for (unsigned left = threads; left > 0;) {
    const uint64_t before = own.progress;
    for (unsigned k = 0; k < threads; ++k) {
      Fiber& fiber = own.fibers[reverse ? threads - 1 - k : k];
      if (fiber.done) continue;
      own.running = &fiber;
      swapcontext(&own.scheduler, &fiber.context);
      left -= fiber.done ? 1 : 0;
    }
    if (left > 0 && own.progress == before) fail("threads wait for each other for ever");
  }
  block = nullptr;
}

}  // namespace emulation
}  // namespace cosmos

#endif /* COSMOS_EMULATION_FIBERS_H */
