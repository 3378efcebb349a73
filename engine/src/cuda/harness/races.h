// Finds races: what two threads read and write, one of them writing, without a barrier, a counter or a copy's
// arrival between them that orders it on a GPU, in whatever order the harness runs them. The compiler calls
// `__tsan_*` for whatever a kernel reads and writes (-fsanitize=thread), here; each thread has a vector clock
// (FastTrack, PLDI 2009). Not known: what lanes of a warp see of each other, and what is in flight to a block
// that ends.

#include <array>
#include <dlfcn.h>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

extern "C" __attribute__((visibility("hidden"))) char __bss_start, _end;

#define HOOK __attribute__((no_sanitize("thread")))

namespace machine {

struct Epoch {
  u32 thread, time;
};

// Of one byte.
struct Access {
  Epoch writer = {0, 0}; // thread 0: nobody
  std::vector<Epoch> readers;
};

typedef std::vector<u32> Clock; // by threads: what has been seen of each
typedef std::array<Access, 4096> Page;

// Readers of a byte that are kept: of more, those that came first.
constexpr size_t MOST_READERS = 64;
// The kernel before; those of this one follow.
constexpr u32 BEFORE = 1;

inline std::vector<std::pair<const void *, size_t>> made; // by the kernel before
inline std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
inline std::vector<Clock> clocks; // of the cluster's threads
inline std::map<std::pair<const void *, u64>, Clock> shown, counted; // at barriers, and at what blocks share
inline std::string found;
inline bool busy;

inline u32 number(const Thread &thread) {
  const u32 block = thread.block.y * gridDim.x + thread.block.x;
  return BEFORE + 1 + block * (u32)of_block + thread.index.x;
}
inline Clock &clock() { return clocks[(size_t)(current - threads)]; }

// What a kernel declares as shared is static here.
inline bool is_shared(const void *at) {
  const bool is_static = (const char *)at >= &__bss_start && (const char *)at < &_end;
  return is_static || (uintptr_t)at - (uintptr_t)shared < sizeof(shared);
}

inline bool is_machines(const void *at) {
  const auto in = [at](const auto &state) { return (uintptr_t)at - (uintptr_t)&state < sizeof(state); };
  return (uintptr_t)at - (uintptr_t)stacks < (size_t)MOST_THREADS * STACK || in(threads) || in(warps) ||
         in(block_barriers) || in(part_barriers) || in(cluster_barrier) || in(current) || in(count) ||
         in(of_block) || in(changes) || in(scheduler) || in(kernel) || in(arguments) || in(stacks) ||
         in(blockDim) || in(gridDim) || in(unseen) || in(busy);
}

inline Access &access_of(uintptr_t at) {
  std::unique_ptr<Page> &page = pages[at / 4096];
  if (!page) page = std::make_unique<Page>();
  return (*page)[at % 4096];
}

inline std::string name_of(u32 thread) {
  if (thread == BEFORE) return "the kernel before";
  const u32 index = thread - BEFORE - 1;
  return "thread " + std::to_string(index % of_block) + " of block " + std::to_string(index / of_block);
}

inline void report(const char *what, u32 other, const char *had, const void *at, const void *code) {
  if (!found.empty()) return;
  Dl_info info = {};
  dladdr(code, &info);
  char place[64];
  std::snprintf(place, sizeof place, "+%#zx", (size_t)((const char *)code - (const char *)info.dli_fbase));
  found = name_of(number(*current)) + what + " what " + name_of(other) + had + ", in " +
          (is_shared(at) ? "shared" : "global") + " memory; " + (info.dli_fname ? info.dli_fname : "?") + place;
}

template <bool WRITES> void note(const void *from, size_t bytes, const void *code) {
  if (!current || unseen || is_machines(from)) return;
  const u32 own = number(*current);
  Clock &clock = machine::clock();
  const auto unordered = [&](Epoch other) {
    return other.thread != 0 && other.thread != own && clock[other.thread] < other.time;
  };
  if (WRITES && !current->waited && !is_shared(from)) report(" writes", BEFORE, " may use", from, code);
  for (uintptr_t at = (uintptr_t)from; at < (uintptr_t)from + bytes; ++at) {
    Access &access = access_of(at);
    if (unordered(access.writer)) {
      report(WRITES ? " writes" : " reads", access.writer.thread, " has written", from, code);
    }
    const Epoch now = {own, clock[own]};
    if (WRITES) {
      for (Epoch reader : access.readers) {
        if (unordered(reader)) report(" writes", reader.thread, " has read", from, code);
      }
      access.readers.clear();
      access.writer = now;
      continue;
    }
    Epoch *known = nullptr;
    for (Epoch &reader : access.readers) {
      if (reader.thread == own) known = &reader;
    }
    if (known) *known = now;
    else if (access.readers.size() < MOST_READERS) access.readers.push_back(now);
  }
}

// What this does is not noted itself.
template <bool WRITES> HOOK void note_once(const void *from, size_t bytes, const void *code) {
  if (busy) return;
  busy = true;
  note<WRITES>(from, bytes, code);
  busy = false;
}

HOOK void reads(const void *from, size_t bytes) {
  note_once<false>(from, bytes, __builtin_return_address(0));
}
HOOK void writes(const void *to, size_t bytes) {
  note_once<true>(to, bytes, __builtin_return_address(0));
}

inline Clock &shown_at(const void *what, u64 phase) {
  Clock &clock = (what && !is_shared(what) && !is_machines(what) ? counted : shown)[{what, phase}];
  clock.resize(clocks[0].size());
  return clock;
}

void release(const void *what, u64 phase) {
  busy = true;
  Clock &own = clock(), &there = shown_at(what, phase);
  for (size_t i = 0; i < own.size(); ++i) there[i] = max(there[i], own[i]);
  ++own[number(*current)];
  busy = false;
}

void acquire(const void *what, u64 phase) {
  busy = true;
  Clock &own = clock();
  if (!what) own[BEFORE] = 1;
  const Clock &there = shown_at(what, phase);
  for (size_t i = 0; i < own.size(); ++i) own[i] = max(own[i], there[i]);
  busy = false;
}

void begin_launch() {
  pages.clear();
  counted.clear();
  found.clear();
  for (auto [from, bytes] : made) {
    for (size_t i = 0; i < bytes; ++i) access_of((uintptr_t)from + i).writer = {BEFORE, 1};
  }
  made.clear();
}

void begin_cluster() {
  for (auto page = pages.begin(); page != pages.end();) {
    const char *begin = (const char *)(page->first * 4096);
    page = is_shared(begin) || is_shared(begin + 4095) ? pages.erase(page) : std::next(page);
  }
  shown.clear();
  clocks.assign((size_t)count, Clock(BEFORE + 1 + gridDim.x * gridDim.y * (size_t)of_block));
  for (int i = 0; i < count; ++i) clocks[(size_t)i][number(threads[i])] = 1;
}

} // namespace machine

extern "C" {

// What kernels before the next one make.
void made_before(const void *from, size_t bytes) { machine::made.push_back({from, bytes}); }

// What the last launch has written to global memory, a range at a time.
void each_written(void (*take)(void *, const void *, size_t), void *to) {
  for (const auto &[number, page] : machine::pages) {
    const char *begin = (const char *)(number * 4096);
    for (size_t i = 0, end; i < page->size(); i = end + 1) {
      const auto written = [&](size_t at) {
        return at < page->size() && (*page)[at].writer.thread > machine::BEFORE && !machine::is_shared(begin + at);
      };
      for (end = i; written(end);) ++end;
      if (end > i) take(to, begin + i, end - i);
    }
  }
}

// The first race that was found in the last launch, or null.
const char *race() { return machine::found.empty() ? nullptr : machine::found.c_str(); }

#define ACCESS(name, writes, bytes)                                                                \
  HOOK void __tsan_##name##bytes(void *at) {                                                       \
    machine::note_once<writes>(at, bytes, __builtin_return_address(0));                            \
  }
#define ACCESSES(bytes)                                                                            \
  ACCESS(read, false, bytes)                                                                       \
  ACCESS(write, true, bytes)                                                                       \
  ACCESS(unaligned_read, false, bytes)                                                             \
  ACCESS(unaligned_write, true, bytes)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
HOOK void __tsan_read_range(void *at, size_t bytes) {
  machine::note_once<false>(at, bytes, __builtin_return_address(0));
}
HOOK void __tsan_write_range(void *at, size_t bytes) {
  machine::note_once<true>(at, bytes, __builtin_return_address(0));
}
HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void *) {}
HOOK void __tsan_func_exit() {}
}
