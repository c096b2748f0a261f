/* side_by_side.h - blocks of a Hopper kernel beside each other: hopper.h has the one that runs. */
#ifndef FASTATTN_TESTS_SIDE_BY_SIDE_H
#define FASTATTN_TESTS_SIDE_BY_SIDE_H

#include <algorithm>
#include <utility>
#include <vector>

#include "hopper.h"

/* A block that is not running now. */
struct block_state {
    fiber threads[FIBERS];
    char *stacks = (char *)malloc((size_t)FIBERS * STACK);
    decltype(warps) in_warps;
    int64_t number, arrivals, in_named[16];
    std::vector<mbarrier> barriers = std::vector<mbarrier>(sizeof raw / 8);
    std::vector<uint8_t> shared = std::vector<uint8_t>(sizeof raw);
    std::vector<bulk_sum> sums[FIBERS];
    thread_products in_products[FIBERS];
};
static void swap_block(block_state &b) {
    fibers = fibers == b.threads ? one_block : b.threads;
    std::swap(warps, b.in_warps);
    std::swap(block_arrivals, b.arrivals);
    std::swap(named, b.in_named);
    std::swap(mbarriers, b.barriers);
    std::swap(bulk_sums, b.sums);
    std::swap(products, b.in_products);
    std::swap_ranges(raw, raw + sizeof raw, b.shared.data());
}
/* Runs all blocks, the first or the last first, `places` of them side by side, which take turns as
 * `seed` says, at speeds of their own. */
static void run_blocks(void (*body)(), int32_t places, uint64_t seed) {
    std::vector<block_state *> there;
    const bool backwards = seed & 32;
    int64_t left = gridDim.x, steps = 0;
    std::vector<uint64_t> speeds;
    for (uint64_t i = 0, all = 0; i < (uint64_t)places; ++i)
        speeds.push_back(all += 1 + (seed >> 4 * (i % 16)) % 8);
    while (left > 0 || !there.empty()) {
        const bool fresh = left > 0 && (int32_t)there.size() < places;
        seed = seed * 6364136223846793005 + 1442695040888963407;
        const uint64_t x = (seed >> 33) % speeds.back();
        size_t i = 0;
        while (speeds[i] <= x) ++i;
        i = fresh ? there.size() : i % there.size();
        if (fresh) {
            there.push_back(new block_state);
            there[i]->number = backwards ? left - 1 : gridDim.x - left;
            --left;
        }
        block_state &b = *there[i];
        swap_block(b);
        blockIdx.x = b.number;
        if (fresh) {
            start_block();
            start_fibers(body, b.stacks);
        }
        const bool running = run_fibers();
        swap_block(b);
        if (++steps > 1000000) {
            fprintf(stderr, "blocks wait for each other\n");
            abort();
        }
        if (running) continue;
        free(b.stacks);
        delete &b;
        there.erase(there.begin() + i);
    }
}

#endif
