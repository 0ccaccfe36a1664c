// Runs the blocks of a launch: the threads of a block are fibers that run one after another from
// barrier to barrier.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "emulation.h"

namespace emulation {
namespace {

bool reversed = false;

// The block that is running. Its fibers are made once and serve all blocks; they are switched by
// _setjmp and _longjmp, which unlike swapcontext make no system call.
struct Block {
  // Not a power of two: the stacks would all compete for the same lines of the cache.
  static constexpr size_t kStack = 32 * 1024 + 7 * 64;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<jmp_buf> fibers;
  std::vector<char> finished;
  jmp_buf scheduler;
  unsigned current = 0;
  int any = 0;       // gathered for __syncthreads_or
  int last_any = 0;  // of the last barrier that all threads have reached
  const std::function<void()>* body = nullptr;
};

Block& block() {
  static Block instance;
  return instance;
}

// Gives control back to the scheduler until it resumes this thread.
void yield() {
  Block& b = block();
  const unsigned thread = b.current;
  if (_setjmp(b.fibers[thread]) == 0) _longjmp(b.scheduler, 1);
}

void run_fiber() {
  for (;;) {
    yield();
    (*block().body)();
    block().finished[block().current] = 1;
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

void run_block(unsigned threads, const std::function<void()>& body) {
  Block& b = block();
  if (b.fibers.empty()) b.fibers = std::vector<jmp_buf>(1024);
  while (b.stacks.size() < threads) start_fiber();
  b.body = &body;
  b.finished.assign(threads, 0);
  for (unsigned done = 0; done < threads;) {
    for (unsigned i = 0; i < threads; ++i) resume(reversed ? threads - 1 - i : i);
    for (char finished : b.finished) done += finished;
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

void __syncthreads() { emulation::yield(); }

int __syncthreads_or(int predicate) {
  emulation::block().any |= predicate;
  __syncthreads();
  return emulation::block().last_any;
}
