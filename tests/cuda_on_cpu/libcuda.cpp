// A libcuda.so.1 without a GPU, so that CudaDevice runs here with the real cuda-bindings in between. As far from
// forgiving as it can be: work is done only when somebody waits for it, new memory is dirty, calls need a context
// that is current to the thread, and after a fault every call fails. A module's image is the path of a library that
// compiled.py made.
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include <chrono>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace {

enum Status {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_CONTEXT = 201, INVALID_PTX = 218,
    INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700, CAPTURE_UNSUPPORTED = 900,
    CAPTURE_UNMATCHED = 903,
};
using Work = std::function<void()>;
using Address = unsigned long long;

struct Graph { std::vector<Work> work; };
struct Stream { std::vector<Work> waiting; Graph *recording = nullptr; };
struct Event { bool timed, recorded = false, happened = false; std::chrono::steady_clock::time_point when; };
struct Module {
    int (*number)(const char *);
    const char *(*signature)(int);
    const char *(*launch)(int, const unsigned *, unsigned, unsigned, void **, const void *, int, unsigned);
};
struct Function { Module *module; int number; };

constexpr size_t TOTAL = size_t(1) << 30;
const int CONTEXT = 0;  // its address is the handle
bool started;
int retained;
Status lost = SUCCESS;
thread_local const void *current;
std::map<Address, size_t> memory;
size_t used;
std::vector<Stream *> streams;

Status ready() { return !started ? NOT_INITIALIZED : lost != SUCCESS ? lost : current != &CONTEXT ? INVALID_CONTEXT : SUCCESS; }
bool known(const Stream *stream) {
    for (const Stream *one : streams) if (one == stream) return true;
    return false;
}
bool on_device(Address start, size_t bytes) {
    auto after = memory.upper_bound(start);
    return after != memory.begin() && (--after, start + bytes <= after->first + after->second);
}
void drain(Stream *stream) {
    std::vector<Work> work;
    work.swap(stream->waiting);
    for (Work &one : work) if (lost == SUCCESS) one();
}
Status add(Stream *stream, Work work) {
    if (Status status = ready(); status != SUCCESS) return status;
    if (!known(stream)) return INVALID_HANDLE;
    (stream->recording ? stream->recording->work : stream->waiting).push_back(std::move(work));
    return SUCCESS;
}
Status wait(Stream *stream) {
    if (Status status = ready(); status != SUCCESS) return status;
    if (!known(stream)) return INVALID_HANDLE;
    if (stream->recording) return CAPTURE_UNSUPPORTED;
    drain(stream);
    return lost;
}

}  // namespace

#define CALL extern "C" __attribute__((visibility("default"))) Status

CALL cuInit(unsigned) { started = true; return SUCCESS; }
CALL cuDriverGetVersion(int *version) { *version = DRIVER_VERSION; return SUCCESS; }
CALL cuDeviceGetCount(int *count) { *count = 1; return ready() == NOT_INITIALIZED ? NOT_INITIALIZED : SUCCESS; }
CALL cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal ? INVALID_VALUE : SUCCESS; }
CALL cuDeviceGetName(char *name, int length, int) { strncpy(name, "no GPU at all", size_t(length)); return SUCCESS; }
CALL cuDeviceGetAttribute(int *value, int attribute, int) {
    static const std::map<int, int> values{{16, 4}, {36, 1'000'000}, {37, 256}, {75, 8}, {76, 7}};
    auto found = values.find(attribute);
    if (found == values.end()) return INVALID_VALUE;
    *value = found->second;
    return SUCCESS;
}
CALL cuDevicePrimaryCtxRetain(const void **context, int) { *context = &CONTEXT; ++retained; return lost; }
CALL cuDevicePrimaryCtxRelease(int) { return retained-- > 0 ? SUCCESS : INVALID_CONTEXT; }
CALL cuCtxSetCurrent(const void *context) {
    if (context != &CONTEXT) return INVALID_CONTEXT;
    current = context;
    return SUCCESS;
}

CALL cuMemGetInfo(size_t *left, size_t *total) { *left = TOTAL - used; *total = TOTAL; return ready(); }
CALL cuMemAlloc(Address *address, size_t bytes) {
    if (Status status = ready(); status != SUCCESS) return status;
    if (!bytes) return INVALID_VALUE;
    if (bytes > TOTAL - used) return OUT_OF_MEMORY;
    void *new_memory = aligned_alloc(512, (bytes + 511) / 512 * 512);
    memset(new_memory, 0xcd, bytes);
    *address = Address(new_memory);
    memory[*address] = bytes, used += bytes;
    return SUCCESS;
}
CALL cuMemFree(Address address) {
    if (Status status = ready(); status != SUCCESS) return status;
    if (!memory.count(address)) return INVALID_VALUE;
    for (Stream *stream : streams) drain(stream);  // it waits
    used -= memory[address];
    memory.erase(address);
    free(reinterpret_cast<void *>(address));
    return lost;
}
CALL cuMemHostAlloc(void **address, size_t bytes, unsigned) {
    *address = malloc(bytes);
    memset(*address, 0xcd, bytes);
    return ready();
}
CALL cuMemFreeHost(void *address) { free(address); return ready(); }
CALL cuMemsetD8Async(Address to, unsigned char value, size_t bytes, Stream *stream) {
    if (!on_device(to, bytes)) return INVALID_VALUE;
    return add(stream, [=] { memset(reinterpret_cast<void *>(to), value, bytes); });
}
CALL cuMemcpyHtoDAsync(Address to, const void *from, size_t bytes, Stream *stream) {
    if (!on_device(to, bytes)) return INVALID_VALUE;
    return add(stream, [=] { memcpy(reinterpret_cast<void *>(to), from, bytes); });
}
CALL cuMemcpyDtoHAsync(void *to, Address from, size_t bytes, Stream *stream) {
    if (!on_device(from, bytes)) return INVALID_VALUE;
    return add(stream, [=] { memcpy(to, reinterpret_cast<void *>(from), bytes); });
}
CALL cuMemcpyDtoDAsync(Address to, Address from, size_t bytes, Stream *stream) {
    if (!on_device(from, bytes) || !on_device(to, bytes)) return INVALID_VALUE;
    return add(stream, [=] { memcpy(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes); });
}

CALL cuStreamCreate(Stream **stream, unsigned flags) {
    if (Status status = ready(); status != SUCCESS) return status;
    if (flags > 1) return INVALID_VALUE;
    streams.push_back(*stream = new Stream);
    return SUCCESS;
}
CALL cuStreamDestroy(Stream *stream) {
    if (!known(stream)) return INVALID_HANDLE;
    std::erase(streams, stream);
    delete stream;
    return SUCCESS;
}
CALL cuStreamSynchronize(Stream *stream) { return wait(stream); }

CALL cuModuleLoadData(Module **module, const void *image) {
    if (Status status = ready(); status != SUCCESS) return status;
    void *library = dlopen(static_cast<const char *>(image), RTLD_NOW);
    if (!library) return INVALID_PTX;
    *module = new Module;
    auto find = [&](auto &to, const char *name) { to = reinterpret_cast<std::decay_t<decltype(to)>>(dlsym(library, name)); };
    find((*module)->number, "kernel_number");
    find((*module)->signature, "kernel_signature");
    find((*module)->launch, "launch");
    return SUCCESS;
}
CALL cuModuleUnload(Module *module) { delete module; return ready(); }
CALL cuModuleGetFunction(Function **function, Module *module, const char *name) {
    if (Status status = ready(); status != SUCCESS) return status;
    int number = module->number(name);
    if (number < 0) return NOT_FOUND;
    *function = new Function{module, number};
    return SUCCESS;
}
CALL cuLaunchKernel(Function *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                    unsigned threads_z, unsigned shared, Stream *stream, void **arguments, void **extra) {
    if (!x || !y || !z || !threads || threads > 1024 || threads_y != 1 || threads_z != 1 || extra) return INVALID_VALUE;
    std::vector<Address> values;  // copied now: the caller may change them
    for (const char *kind = function->module->signature(function->number); *kind; ++kind, ++arguments) {
        values.push_back(0);
        memcpy(&values.back(), *arguments, *kind == 'p' || *kind == 'q' ? 8 : 4);
    }
    return add(stream, [=]() mutable {
        std::vector<void *> pointers;
        for (Address &value : values) pointers.push_back(&value);
        unsigned grid[] = {x, y, z};
        if (function->module->launch(function->number, grid, threads, shared, pointers.data(), nullptr, 0, 0))
            lost = ILLEGAL_ADDRESS;
    });
}

CALL cuStreamBeginCapture(Stream *stream, int mode) {
    if (Status status = ready(); status != SUCCESS) return status;
    if (!known(stream) || mode < 0 || mode > 2) return INVALID_VALUE;
    stream->recording = new Graph;
    return SUCCESS;
}
CALL cuStreamEndCapture(Stream *stream, Graph **graph) {
    if (Status status = ready(); status != SUCCESS) return status;
    *graph = stream->recording;
    stream->recording = nullptr;
    return *graph ? SUCCESS : CAPTURE_UNMATCHED;
}
CALL cuGraphInstantiateWithFlags(Graph **executable, Graph *graph, unsigned long long flags) {
    if (flags) return INVALID_VALUE;
    *executable = new Graph(*graph);
    return ready();
}
CALL cuGraphUpload(Graph *, Stream *stream) { return known(stream) ? ready() : INVALID_HANDLE; }
CALL cuGraphLaunch(Graph *executable, Stream *stream) {
    for (const Work &work : executable->work)
        if (Status status = add(stream, work); status != SUCCESS) return status;
    return ready();
}
CALL cuGraphExecDestroy(Graph *executable) { delete executable; return ready(); }
CALL cuGraphDestroy(Graph *graph) { delete graph; return ready(); }

CALL cuEventCreate(Event **event, unsigned flags) { *event = new Event{!(flags & 2)}; return flags > 3 ? INVALID_VALUE : ready(); }
CALL cuEventRecord(Event *event, Stream *stream) {
    event->recorded = true, event->happened = false;
    return add(stream, [=] { event->happened = true, event->when = std::chrono::steady_clock::now(); });
}
CALL cuEventQuery(Event *event) {
    if (Status status = ready(); status != SUCCESS) return status;
    bool happened = event->happened;
    for (Stream *stream : streams) drain(stream);  // the next query finds it
    return lost != SUCCESS ? lost : happened ? SUCCESS : NOT_READY;
}
CALL cuEventSynchronize(Event *) {
    if (Status status = ready(); status != SUCCESS) return status;
    for (Stream *stream : streams) drain(stream);
    return lost;
}
CALL cuEventElapsedTime(float *milliseconds, Event *start, Event *end) {
    if (!start->timed || !end->timed || !start->recorded || !end->recorded) return INVALID_HANDLE;
    if (!start->happened || !end->happened) return NOT_READY;
    *milliseconds = std::chrono::duration<float, std::milli>(end->when - start->when).count();
    return ready();
}
CALL cuEventDestroy(Event *event) {
    for (Stream *stream : streams) drain(stream);
    delete event;
    return ready();
}

// cuda-bindings asks for every function by its plain name and the version of CUDA it was made for.
CALL cuGetProcAddress_v2(const char *symbol, void **function, int, unsigned long long, int *found) {
    *function = dlsym(RTLD_DEFAULT, symbol);
    if (found) *found = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}
CALL cuGetProcAddress(const char *symbol, void **function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}

// For libcublaslt.cpp.
CALL cpu_add_work(void *stream, void (*work)(void *), void *data) {
    return add(static_cast<Stream *>(stream), [=] { work(data); });
}
