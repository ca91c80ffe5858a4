// The threads that torch's operations compute with. After each operation they look for the next one for milliseconds, on
// the processors that threads of ours would need: a call that comes then is best done by them.
#pragma once
#ifdef __linux__
#include <dirent.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#endif

namespace {

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

#ifdef __linux__
constexpr char NAME[] = "moe_impls";  // of our own threads

// Those of GCC's OpenMP, or of what has its entry point, that belong to the calling thread. Whether they are looking for
// work is what their clocks say, which stand still while they sleep.
class OpenMP {
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
    using Time = std::chrono::steady_clock::time_point;
    static constexpr std::chrono::milliseconds PATIENCE{100};  // threads may end at any time: how often they are met anew
    static constexpr int SIGHTINGS = 3;                        // of running threads, before they are met at all
    static constexpr int ASKED = 3;                            // of them, at most
    static constexpr int TURNS = 16;                           // between two looks at a clock

    const Parallel parallel = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    int known = 0;  // threads, with the caller
    std::unique_ptr<clockid_t[]> clocks;  // of the others
    clockid_t own{};
    std::atomic<int> met{0};
    Time last{};
    int seen = 0;

    static int64_t nanoseconds(clockid_t clock) {
        timespec t;
        return clock_gettime(clock, &t) ? -1 : int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
    }

    // Whether a thread of the process is running beside the caller and ours. To meet those of OpenMP starts them where
    // they have not been yet, and a process whose threads were started hangs in OpenMP when it is forked.
    static bool others_run() {
        DIR* tasks = opendir("/proc/self/task");
        if (!tasks) return false;
        const int own = int(syscall(SYS_gettid));
        bool found = false;
        for (const dirent* task; !found && (task = readdir(tasks));) {
            if (std::atoi(task->d_name) <= 0 || std::atoi(task->d_name) == own) continue;
            char path[64], text[64] = {};  // "17 (name) S ..."
            std::snprintf(path, sizeof path, "/proc/self/task/%.16s/stat", task->d_name);
            if (std::FILE* stat = std::fopen(path, "r")) {
                found = std::fgets(text, sizeof text, stat) && !std::strstr(text, NAME) && std::strstr(text, ") R");
                std::fclose(stat);
            }
        }
        closedir(tasks);
        return found;
    }

    void meet(int threads) {
        clocks.reset(new clockid_t[threads]);
        met = 0;
        known = threads;
        auto introduce = [](void* self) {
            auto* openmp = static_cast<OpenMP*>(self);
            clockid_t clock;
            pthread_getcpuclockid(pthread_self(), &clock);
            if (clock != openmp->own) openmp->clocks[openmp->met++] = clock;
        };
        pthread_getcpuclockid(pthread_self(), &own);
        parallel(introduce, this, threads, 0);
    }

   public:
    // Whether so many threads, with the caller, are there and not asleep.
    bool is_awake(int threads) {
        if (!parallel) return false;
        if (known != threads) {
            const Time now = std::chrono::steady_clock::now();
            if (now - last < PATIENCE) return false;
            last = now;
            seen += others_run();
            if (seen < SIGHTINGS) return false;
            meet(threads);
        }
        const int others = met.load(std::memory_order_relaxed), asked = others < ASKED ? others : ASKED;
        for (int i = 0; i < asked; i++) {
            const clockid_t clock = clocks[others * i / asked];
            const int64_t before = nanoseconds(clock);
            for (int turn = 0; turn < TURNS; turn++) relax();
            if (before < 0) known = 0;  // it ended
            if (before < 0 || nanoseconds(clock) <= before) return false;
        }
        return asked > 0;
    }

    // Call work(on) in all of so many threads.
    void run(void (*work)(void*), void* on, int threads) const { parallel(work, on, unsigned(threads), 0); }
};
#else
struct OpenMP {  // whose threads cannot be asked here
    bool is_awake(int) const { return false; }
    void run(void (*)(void*), void*, int) const {}
};
#endif

}  // namespace
