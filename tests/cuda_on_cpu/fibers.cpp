// Runs a kernel: the threads of a block as fibers on this one thread of the CPU, blocks one after another.
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <random>

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {
namespace {

constexpr int MAX_THREADS = 1024, WARP = 32, MAX_DYNAMIC = 48 << 10;
constexpr size_t STACK = 64 << 10, STAGGER = 320;  // tops at different cache sets, or they evict each other

struct Thread : Fiber {
    jmp_buf registers;
    bool started, done;  // started: has a stack and a loop that waits for the next block
    int operand;
};
struct Warp { int size, live, arrived; Op op; };
struct Tail { unsigned char *start; int length; };  // bytes after an argument's memory that nobody may change

Thread threads[MAX_THREADS];
Warp warps[MAX_THREADS / WARP];
unsigned char *stacks[MAX_THREADS];
unsigned char *dynamic_end;  // a page follows that cannot be touched

jmp_buf caller;
char error[300];
const Kernel *kernel;
void **arguments;
int live, arrived, barrier_line;

Thread *ready[MAX_THREADS];  // a ring; a thread is in it once at most
unsigned first, count;
unsigned order;  // 0: threads in order; 1: last first; else the seed of a shuffle
std::minstd_rand dice;

[[noreturn]] void fail(const char *what) {
    if (error[0]) _longjmp(caller, 1);  // what was noted first is the cause
    const Three &at = running->place, &in = block.index;
    snprintf(error, sizeof error, "kernel %s: %s (block %u,%u,%u thread %u)", kernel->name, what, in.x, in.y, in.z, at.x);
    _longjmp(caller, 1);
}

template <class T> void arrange(T *begin, T *end) {
    if (order == 1) std::reverse(begin, end);
    else if (order > 1) std::shuffle(begin, end, dice);
}

// Those of begin..end that have not returned may run, in the order asked for.
void wake(Thread *begin, Thread *end) {
    Thread *woken[MAX_THREADS];
    int number = 0;
    for (Thread *thread = begin; thread != end; ++thread)
        if (!thread->done) woken[number++] = thread;
    arrange(woken, woken + number);
    for (int i = 0; i < number; ++i) ready[(first + count++) % MAX_THREADS] = woken[i];
}

void thread_loop();

[[noreturn]] void begin(Thread *thread) {
    ucontext_t context;
    int place = int(thread - threads);
    if (!stacks[place]) {
        void *memory = mmap(nullptr, STACK + STAGGER * 16, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) fail("no memory for a thread's stack");
        mprotect(memory, size_t(sysconf(_SC_PAGESIZE)), PROT_NONE);
        stacks[place] = static_cast<unsigned char *>(memory);
    }
    thread->started = true;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[place];
    context.uc_stack.ss_size = STACK + STAGGER * (unsigned(place) % 16);
    context.uc_link = nullptr;
    makecontext(&context, thread_loop, 0);
    setcontext(&context);
    __builtin_unreachable();
}

__attribute__((noinline)) void run_next() {
    Thread *me = static_cast<Thread *>(running);  // nullptr when a block begins
    if (!count) {
        if (live) fail("threads wait for each other for ever: not all of them reach the barrier or warp function");
        if (!_setjmp(me->registers)) _longjmp(caller, 2);  // the block is done
        return;
    }
    Thread *next = ready[first];
    first = (first + 1) % MAX_THREADS, --count;
    if (next == me && !me->done) return;
    if (me && me->started && _setjmp(me->registers)) return;
    running = next;
    if (next->started) _longjmp(next->registers, 1);
    begin(next);
}

Warp &warp_of(Thread *thread) { return warps[(thread - threads) / WARP]; }

void release_block() {
    arrived = 0;
    wake(threads, threads + block.threads.x);
}

void thread_loop() {
    for (;;) {
        kernel->call(arguments);
        Thread *me = static_cast<Thread *>(running);
        me->done = true;
        --live;
        Warp &warp = warp_of(me);
        --warp.live;
        if (warp.arrived) fail("returned while others of its warp wait in a warp function");
        if (live && arrived == live) release_block();
        run_next();
    }
}

template <class T, class Join> void join(Thread *lanes, int size, Join two) {  // in the order of a butterfly
    T values[WARP];
    for (int lane = 0; lane < size; ++lane) std::memcpy(&values[lane], &lanes[lane].given, 4);
    for (int half = WARP / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) values[lane] = two(values[lane], values[lane + half]);
    for (int lane = 0; lane < size; ++lane) std::memcpy(&lanes[lane].got, &values[0], 4);
}

void complete(Thread *lanes, Op op) {
    auto sum = [](auto a, auto b) { return a + b; };
    auto most = [](auto a, auto b) { return b > a ? b : a; };
    switch (op) {
        case Op::shuffle:
            for (int lane = 0; lane < WARP; ++lane) lanes[lane].got = lanes[lanes[lane].operand].given;
            break;
        case Op::ballot:
            for (int lane = 0; lane < WARP; ++lane) lanes[lane].given <<= lane;
            [[fallthrough]];
        case Op::bit_or: join<unsigned>(lanes, WARP, [](unsigned a, unsigned b) { return a | b; }); break;
        case Op::sum_float: join<float>(lanes, WARP, sum); break;
        case Op::sum_int: join<int>(lanes, WARP, sum); break;
        case Op::sum_unsigned: join<unsigned>(lanes, WARP, sum); break;
        case Op::max_float: join<float>(lanes, WARP, most); break;
        case Op::max_int: join<int>(lanes, WARP, most); break;
        case Op::max_unsigned: join<unsigned>(lanes, WARP, most); break;
        case Op::sync: break;
    }
}

void run_block() {
    int number = int(block.threads.x);
    live = number, arrived = 0, first = count = 0;
    for (int i = 0; i < number; ++i) threads[i].place = {unsigned(i), 0, 0}, threads[i].done = false;
    for (int i = 0; i < number / WARP; ++i) warps[i] = {WARP, WARP, 0, Op::sync};
    running = nullptr;
    wake(threads, threads + number);
}

void dirty_shared_memory();

extern "C" void on_signal(int number, siginfo_t *info, void *) {
    static char text[120];
    if (number == SIGSEGV || number == SIGBUS)
        snprintf(text, sizeof text, "touches memory that is not its own, at address %p", info->si_addr);
    else if (number == SIGFPE) snprintf(text, sizeof text, "divides a whole number by zero");
    else snprintf(text, sizeof text, "uses an address that is not a multiple of the type's size, or leaves an array");
    fail(text);
}

struct Signals {  // while a kernel runs, its faults are ours
    static constexpr int numbers[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
    struct sigaction before[5];
    stack_t stack_before;
    Signals() {
        static unsigned char stack[64 << 10];
        stack_t ours{};
        ours.ss_sp = stack, ours.ss_size = sizeof stack;
        sigaltstack(&ours, &stack_before);
        struct sigaction action{};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 5; ++i) sigaction(numbers[i], &action, &before[i]);
    }
    ~Signals() {
        for (int i = 0; i < 5; ++i) sigaction(numbers[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

}  // namespace

Fiber *running;
Block block;

void block_barrier(int line) {
    if (!arrived) barrier_line = line;
    else if (barrier_line != line) fail("threads of a block wait at different __syncthreads");
    if (++arrived == live) release_block();
    run_next();
}

void warp_operation(Op op, int operand) {
    Thread *me = static_cast<Thread *>(running);
    Warp &warp = warp_of(me);
    if (warp.live < warp.size) fail("a warp function after another thread of the warp has returned");
    if (warp.arrived && warp.op != op) fail("threads of a warp wait in different warp functions");
    warp.op = op, me->operand = operand;
    if (++warp.arrived == warp.size) {
        Thread *lanes = threads + (me - threads) / WARP * WARP;
        warp.arrived = 0;
        complete(lanes, op);
        wake(lanes, lanes + WARP);
    }
    run_next();
}

namespace {

extern "C" unsigned char __start_cuda_shared[] __attribute__((weak)), __stop_cuda_shared[] __attribute__((weak));

void dirty_shared_memory() {  // all ones: floats are nan, counts are -1
    memset(__start_cuda_shared, 0xff, size_t(__stop_cuda_shared - __start_cuda_shared));
    if (block.dynamic_shared) memset(block.dynamic_shared, 0xff, size_t(dynamic_end - block.dynamic_shared));
}

void prepare_dynamic(unsigned bytes) {
    if (!dynamic_end) {
        void *memory = mmap(nullptr, MAX_DYNAMIC + (64 << 10), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        dynamic_end = static_cast<unsigned char *>(memory) + MAX_DYNAMIC;
        mprotect(dynamic_end, 64 << 10, PROT_NONE);
    }
    block.dynamic_shared = bytes ? dynamic_end - (bytes + 15) / 16 * 16 : dynamic_end;
}

// Runs all blocks; returns after the last, or with `error` written.
void run_grid() {
    static unsigned turn[1 << 16];
    static unsigned long blocks, at;  // static: they outlive the jumps
    const Three &grid = block.grid;
    blocks = (unsigned long)grid.x * grid.y * grid.z;
    at = 0;
    if (blocks > 1 << 16) {
        snprintf(error, sizeof error, "kernel %s: more than 65536 blocks are more than a test should have", kernel->name);
        return;
    }
    for (unsigned long i = 0; i < blocks; ++i) turn[i] = unsigned(i);
    arrange(turn, turn + blocks);
    switch (_setjmp(caller)) {
        case 1:  // an error: what the fibers were doing is lost
            for (Thread &thread : threads) thread.started = false;
            return;
        case 2: ++at; [[fallthrough]];
        default: break;
    }
    if (at == blocks) return;
    unsigned index = turn[at];
    block.index = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
    dirty_shared_memory();
    run_block();
    run_next();
}

// Notes what was written there, if nothing worse is noted yet, and makes it as it was.
void check_tails(const Tail *tails, int number) {
    if (_setjmp(caller)) return;  // it was freed meanwhile
    for (int i = 0; i < number; ++i)
        for (int j = 0; j < tails[i].length; ++j) {
            if (tails[i].start[j] != 0xa5 && !error[0])
                snprintf(error, sizeof error, "kernel %s: wrote past the end of a memory it was given, byte %d after it",
                         kernel->name, j);
            tails[i].start[j] = 0xa5;
        }
}

}  // namespace
}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int kernel_number(const char *name) {
    for (int i = 0; i < kernel_count; ++i)
        if (!strcmp(kernels[i].name, name)) return i;
    return -1;
}
EXPORT const char *kernel_name(int number) { return number < kernel_count ? kernels[number].name : nullptr; }
EXPORT const char *kernel_signature(int number) { return kernels[number].signature; }

// nullptr, or what a GPU would not have forgiven.
EXPORT const char *launch(int number, const unsigned *grid, unsigned threads_a_block, unsigned shared, void **values,
                          const Tail *tails, int tail_count, unsigned thread_order) {
    kernel = &kernels[number], arguments = values, order = thread_order, error[0] = 0;
    dice.seed(thread_order);
    block.grid = {grid[0], grid[1], grid[2]}, block.threads = {threads_a_block, 1, 1};
    prepare_dynamic(shared);
    Signals ours;
    run_grid();
    check_tails(tails, tail_count);
    return error[0] ? error : nullptr;
}

// Memory that ends, but for its last 511 bytes, at a page that cannot be touched; nullptr when there is none.
EXPORT unsigned char *allocate(size_t bytes) {
    size_t page = size_t(sysconf(_SC_PAGESIZE)), used = (bytes + 511) / 512 * 512, pages = (used + page - 1) / page * page;
    void *memory = mmap(nullptr, pages + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    unsigned char *start = static_cast<unsigned char *>(memory), *end = start + page + pages;
    mprotect(start, page, PROT_NONE);
    mprotect(end, page, PROT_NONE);
    memset(end - used + bytes, 0xa5, used - bytes);
    return end - used;
}

// Its addresses are never used again, so that whoever still has one is found.
EXPORT void release(unsigned char *memory, size_t bytes) {
    size_t page = size_t(sysconf(_SC_PAGESIZE)), used = (bytes + 511) / 512 * 512;
    unsigned char *end = memory + used, *start = end - (used + page - 1) / page * page;
    mmap(start, size_t(end - start), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
}
