// Runs CUDA kernels on the host: one block after another, its 256 threads as coroutines.
//
// Each thread runs until a barrier, then the next one; shared memory is static, because one block
// runs at a time. Same indexing, guards and order of phases as on a device.
#pragma once

#include <cmath>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__ static
#define __shared__ static

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

static Index threadIdx, blockIdx, blockDim, gridDim;

constexpr unsigned kHostThreads = 256;
static ucontext_t scheduler, coroutines[kHostThreads];
static bool finished[kHostThreads];
static void (*body)(void*);
static void* body_data;

static void __syncthreads() { swapcontext(&coroutines[threadIdx.x], &scheduler); }

template <typename T>
static T atomicAdd(T* address, T value) {
    const T before = *address;
    *address += value;
    return before;
}

static void enter() {
    body(body_data);
    finished[threadIdx.x] = true;
    swapcontext(&coroutines[threadIdx.x], &scheduler);
}

template <typename Kernel>
static void run_grid(unsigned across, unsigned down, Kernel kernel) {
    constexpr std::size_t stack = 64 * 1024;
    std::vector<char> stacks(kHostThreads * stack);
    blockDim.x = kHostThreads;
    gridDim.x = across;
    gridDim.y = down;
    body = [](void* data) { (*static_cast<Kernel*>(data))(); };
    body_data = &kernel;
    for (unsigned block = 0; block < across * down; ++block) {
        blockIdx.x = block % across;
        blockIdx.y = block / across;
        for (unsigned t = 0; t < kHostThreads; ++t) {
            finished[t] = false;
            getcontext(&coroutines[t]);
            coroutines[t].uc_stack.ss_sp = stacks.data() + t * stack;
            coroutines[t].uc_stack.ss_size = stack;
            coroutines[t].uc_link = nullptr;
            makecontext(&coroutines[t], enter, 0);
        }
        for (bool running = true; running;) {
            running = false;
            for (unsigned t = 0; t < kHostThreads; ++t) {
                if (finished[t]) continue;
                threadIdx.x = t;
                swapcontext(&scheduler, &coroutines[t]);
                running = running || !finished[t];
            }
        }
    }
}
