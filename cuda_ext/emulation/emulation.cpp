// Scheduler of the host emulation: see cuda_emulation.h.
#include "cuda_emulation.h"

#include <ucontext.h>

#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "abi.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace pmf::emulation {
namespace {

constexpr size_t kStackBytes = 512u << 10;
enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };
enum Schedule { kForward, kReverse, kRandom };

struct Fibre {
  Thread thread;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;  // the address sanitizer's own
  State state = State::kDone;
  unsigned mask = 0;  // of the warp barrier it waits at
};

Schedule schedule = kForward;
std::mt19937_64 random_source;
std::vector<std::unique_ptr<Fibre>> fibres;  // reused by all launches
size_t n_threads = 0;                        // of the running block
Fibre* running = nullptr;
ucontext_t scheduler_context;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
const std::function<void()>* kernel = nullptr;
unsigned char* shared_memory = nullptr;
std::vector<unsigned char> warp_slots;
std::string failure;

// The sanitizer must be told of every change of stack.
void before_switch(void** fake_stack, const void* bottom, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
#else
  (void)fake_stack, (void)bottom, (void)bytes;
#endif
}
void after_switch(void* fake_stack, const void** old_bottom, size_t* old_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, old_bottom, old_bytes);
#else
  (void)fake_stack, (void)old_bottom, (void)old_bytes;
#endif
}

void to_scheduler(bool is_last) {
  Fibre* self = running;
  before_switch(is_last ? nullptr : &self->fake_stack, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&self->context, &scheduler_context);
  after_switch(self->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void fibre_main() {
  after_switch(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*kernel)();
  running->state = State::kDone;
  to_scheduler(true);
}

void run(Fibre& fibre) {
  running = &fibre;
  before_switch(&scheduler_fake_stack, fibre.stack.get(), kStackBytes);
  swapcontext(&scheduler_context, &fibre.context);
  after_switch(scheduler_fake_stack, nullptr, nullptr);
}

void start_block(uint3 block_index, dim3 block, dim3 grid) {
  n_threads = static_cast<size_t>(block.x) * block.y * block.z;
  while (fibres.size() < n_threads) fibres.push_back(std::make_unique<Fibre>());
  warp_slots.assign((n_threads + 31) / 32 * 32 * kSlotBytes, 0xff);
  for (size_t t = 0; t < n_threads; ++t) {
    Fibre& fibre = *fibres[t];
    const unsigned linear = static_cast<unsigned>(t);
    fibre.thread = {{linear % block.x, linear / block.x % block.y, linear / (block.x * block.y)},
                    block_index, block, grid, static_cast<int>(t), warp_slots.data() + t / 32 * 32 * kSlotBytes};
    fibre.state = State::kReady;
    fibre.fake_stack = nullptr;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStackBytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, fibre_main, 0);
  }
}

size_t count(State state) {
  size_t found = 0;
  for (size_t t = 0; t < n_threads; ++t) found += fibres[t]->state == state;
  return found;
}

// Lets the lanes of a complete warp barrier go on; true if there was one.
bool release_warps() {
  bool released = false;
  for (size_t t = 0; t < n_threads; ++t) {
    if (fibres[t]->state != State::kAtWarpBarrier) continue;
    const size_t first = t / 32 * 32;
    const unsigned mask = fibres[t]->mask;
    bool complete = true;
    for (size_t lane = 0; lane < 32 && complete; ++lane) {
      if (((mask >> lane) & 1) == 0) continue;
      complete = first + lane < n_threads && fibres[first + lane]->state == State::kAtWarpBarrier &&
                 fibres[first + lane]->mask == mask;
    }
    for (size_t lane = 0; lane < 32 && complete; ++lane)
      if ((mask >> lane) & 1) fibres[first + lane]->state = State::kReady;
    released |= complete;
  }
  return released;
}

// The next thread to run, or null: nobody can.
Fibre* choose() {
  static std::vector<Fibre*> ready;
  ready.clear();
  for (size_t t = 0; t < n_threads; ++t)
    if (fibres[t]->state == State::kReady) ready.push_back(fibres[t].get());
  if (ready.empty()) return nullptr;
  if (schedule == kForward) return ready.front();
  if (schedule == kReverse) return ready.back();
  return ready[random_source() % ready.size()];
}

void run_block() {
  while (failure.empty()) {
    // A warp may leave a complete barrier while others still lag behind theirs: only random schedules do that.
    if (schedule == kRandom && random_source() % 4 == 0) release_warps();
    if (Fibre* next = choose()) {
      run(*next);
      continue;
    }
    if (count(State::kDone) == n_threads) return;
    if (release_warps()) continue;
    if (count(State::kAtBlockBarrier) == n_threads) {
      for (size_t t = 0; t < n_threads; ++t) fibres[t]->state = State::kReady;
      continue;
    }
    failure = "a barrier is not reached by every thread that it waits for";
  }
}

std::vector<unsigned> block_order(unsigned blocks) {
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule == kReverse) std::reverse(order.begin(), order.end());
  if (schedule == kRandom) std::shuffle(order.begin(), order.end(), random_source);
  return order;
}

}  // namespace

Thread& current() { return running->thread; }
void* dynamic_shared() { return shared_memory; }

void block_barrier() {
  running->state = State::kAtBlockBarrier;
  to_scheduler(false);
}

void warp_barrier(unsigned mask) {
  if (((mask >> (running->thread.linear % 32)) & 1) == 0) fail("a lane waits at a warp barrier that does not name it");
  running->mask = mask;
  running->state = State::kAtWarpBarrier;
  to_scheduler(false);
}

void fail(const char* reason) {
  if (failure.empty()) failure = reason;
  running->state = State::kDone;
  to_scheduler(true);
  std::abort();  // an abandoned thread is never run again
}

int launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  failure.clear();
  kernel = &body;
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (const unsigned b : block_order(blocks)) {
    shared_memory = static_cast<unsigned char*>(operator new[](shared_bytes, std::align_val_t{32}));
    std::memset(shared_memory, 0xff, shared_bytes);
    start_block({b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)}, block, grid);
    run_block();
    operator delete[](shared_memory, std::align_val_t{32});
    if (!failure.empty()) return kFailed;
  }
  return PMF_OK;
}

}  // namespace pmf::emulation

// kind: 0 forward, 1 reverse, 2 random with the seed.
PMF_EXPORT void pmf_emulation_schedule(int64_t kind, int64_t seed) {
  pmf::emulation::schedule = static_cast<pmf::emulation::Schedule>(kind);
  pmf::emulation::random_source.seed(static_cast<uint64_t>(seed));
}
PMF_EXPORT const char* pmf_emulation_failure() { return pmf::emulation::failure.c_str(); }
