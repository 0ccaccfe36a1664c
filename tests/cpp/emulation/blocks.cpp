// Runs the blocks of a launch: the threads of a block are fibers that run one after another from
// barrier to barrier, those of a warp from shuffle to shuffle.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "emulation.h"

namespace emulation {
namespace {

bool reversed = false;

// What a thread does next: run, meet the threads of its warp, of its block, or nothing.
enum class Wait : char { kNothing, kWarp, kBlock, kFinished };

// The block that is running. Its fibers are made once and serve all blocks; they are switched by
// _setjmp and _longjmp, which unlike swapcontext make no system call.
struct Block {
  static constexpr unsigned kWarp = 32;
  // Not a power of two: the stacks would all compete for the same lines of the cache.
  static constexpr size_t kStack = 32 * 1024 + 7 * 64;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<jmp_buf> fibers;
  std::vector<Wait> waits;
  jmp_buf scheduler;
  unsigned current = 0;
  int any = 0;       // gathered for __syncthreads_or
  int last_any = 0;  // of the last barrier that all threads have reached
  // What threads show to their warp, in turn in one half and in the other: a thread that is ahead
  // of its neighbours leaves alone what they still read.
  std::vector<double> shown;
  std::vector<char> half;
  const std::function<void()>* body = nullptr;
};

Block& block() {
  static Block instance;
  return instance;
}

// Gives control back to the scheduler until what this thread waits for has happened.
void yield(Wait wait) {
  Block& b = block();
  const unsigned thread = b.current;
  b.waits[thread] = wait;
  if (_setjmp(b.fibers[thread]) == 0) _longjmp(b.scheduler, 1);
}

void run_fiber() {
  for (;;) {
    yield(Wait::kFinished);
    (*block().body)();
  }
}

void resume(unsigned thread) {
  Block& b = block();
  b.current = thread;
  threadIdx = dim3(thread);
  if (_setjmp(b.scheduler) == 0) _longjmp(b.fibers[thread], 1);
}

// Starts the fiber of one more thread and lets it run to its first yield.
void start_fiber() {
  Block& b = block();
  b.current = static_cast<unsigned>(b.stacks.size());
  b.stacks.push_back(std::make_unique<char[]>(Block::kStack));
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = b.stacks.back().get();
  context.uc_stack.ss_size = Block::kStack;
  makecontext(&context, run_fiber, 0);
  if (_setjmp(b.scheduler) == 0) setcontext(&context);
}

// How many of the threads [first, last) wait for this.
unsigned count_waiting(unsigned first, unsigned last, Wait wait) {
  const auto waits = block().waits.begin();
  return static_cast<unsigned>(std::count(waits + first, waits + last, wait));
}

// Runs the threads of a warp until all of them wait for the block or have finished.
void run_warp(unsigned first, unsigned last) {
  Block& b = block();
  for (unsigned shuffling = last - first; shuffling > 0;) {
    for (unsigned i = first; i < last; ++i) {
      const unsigned thread = reversed ? last - 1 - (i - first) : i;
      if (b.waits[thread] == Wait::kNothing) resume(thread);
    }
    shuffling = count_waiting(first, last, Wait::kWarp);
    if (shuffling == 0) return;
    if (shuffling != last - first) {
      fprintf(stderr, "emulation: %u of %u threads of a warp shuffle\n", shuffling, last - first);
      abort();
    }
    std::fill(b.waits.begin() + first, b.waits.begin() + last, Wait::kNothing);
  }
}

void run_block(unsigned threads, const std::function<void()>& body) {
  Block& b = block();
  if (b.fibers.empty()) {
    b.fibers = std::vector<jmp_buf>(1024);
    b.waits.resize(1024);
    b.shown.resize(2 * 1024);
    b.half.resize(1024);
  }
  while (b.stacks.size() < threads) start_fiber();
  b.body = &body;
  for (unsigned done = 0; done < threads;) {
    std::fill(b.waits.begin(), b.waits.begin() + threads, Wait::kNothing);
    const unsigned warps = (threads + Block::kWarp - 1) / Block::kWarp;
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned first = (reversed ? warps - 1 - i : i) * Block::kWarp;
      run_warp(first, std::min(threads, first + Block::kWarp));
    }
    done = count_waiting(0, threads, Wait::kFinished);
    if (done != 0 && done != threads) {
      fprintf(stderr, "emulation: %u of %u threads have left while the others wait\n", done,
              threads);
      abort();
    }
    b.last_any = b.any;
    b.any = 0;
  }
}

}  // namespace

void set_reversed(bool value) { reversed = value; }

void run_blocks(dim3 grid, dim3 threads, const std::function<void()>& body) {
  gridDim = grid;
  for (unsigned i = 0; i < grid.x; ++i) {
    blockIdx = dim3(reversed ? grid.x - 1 - i : i);
    run_block(threads.x, body);
  }
}

}  // namespace emulation

void __syncthreads() { emulation::yield(emulation::Wait::kBlock); }

double __shfl_xor_sync(unsigned, double value, int distance) {
  emulation::Block& b = emulation::block();
  const unsigned thread = b.current;
  double* const shown = b.shown.data() + 2 * thread;
  const int half = b.half[thread] ^= 1;
  shown[half] = value;
  emulation::yield(emulation::Wait::kWarp);
  return b.shown[2 * (thread ^ static_cast<unsigned>(distance)) + half];
}

int __syncthreads_or(int predicate) {
  emulation::block().any |= predicate;
  __syncthreads();
  return emulation::block().last_any;
}
