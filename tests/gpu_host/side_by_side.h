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

/* ---- clusters of two: blocks 2 i and 2 i + 1 reach each other's shared memory
 * ------------------*/

static std::vector<block_state *> there;

/* Shared memory of the block that runs, or of another that has begun. */
struct reached_block {
    uint8_t *shared;
    std::vector<mbarrier> *barriers;
};
static reached_block block_of(int64_t number) {
    if (number == blockIdx.x) return {raw, &mbarriers};
    for (block_state *b : there)
        if (b->number == number) return {b->shared.data(), &b->barriers};
    fprintf(stderr, "block %d has not begun, or has ended\n", (int)number);
    abort();
}

/* An address has its block's rank, and 1, in its highest byte. */
static uint32_t mapa(uint32_t smem, uint32_t rank) {
    shared_at(smem);
    return smem | (rank + 1) << 24;
}
static int64_t number_of(uint32_t address) { return blockIdx.x / 2 * 2 + (address >> 24) - 1; }
static uint32_t offset_of(uint32_t address) { return (address & 0xFFFFFF) - SHARED_BASE; }

static void came(int64_t block, uint32_t barrier, int32_t arrivals, int32_t bytes) {
    mbarrier &b = (*block_of(block).barriers)[offset_of(barrier) / 8];
    b.pending -= arrivals, b.bytes -= bytes;
    end_phase(b);
}
static void mbarrier_arrive_cluster(uint32_t barrier) { came(number_of(barrier), barrier, 1, 0); }
static void st_async(uint32_t to, uint32_t x, uint32_t barrier) {
    memcpy(block_of(number_of(to)).shared + offset_of(to), &x, 4);
    came(number_of(barrier), barrier, 0, 4);
}

/* Copies to another block: at once or, if `late`, when it waits for them. */
struct cluster_copy {
    int64_t from_block, to_block;
    uint32_t from, to, bytes, barrier;
};
static std::vector<cluster_copy> cluster_copies;
static void make_copy(const cluster_copy &c) {
    memcpy(block_of(c.to_block).shared + offset_of(c.to),
           block_of(c.from_block).shared + offset_of(c.from), c.bytes);
    came(c.to_block, c.barrier, 0, (int32_t)c.bytes);
}
static void cp_async_bulk_cluster(uint32_t to, uint32_t smem, uint32_t bytes, uint32_t barrier) {
    if (to % 16 || smem % 16 || bytes % 16) abort();
    const cluster_copy c = {blockIdx.x, number_of(to), smem, to, bytes, barrier};
    if (late)
        cluster_copies.push_back(c);
    else
        make_copy(c);
}
static void deliver_copies(uint32_t barrier) {
    for (size_t i = 0; i < cluster_copies.size();) {
        const cluster_copy c = cluster_copies[i];
        const bool mine = c.to_block == blockIdx.x && offset_of(c.barrier) == offset_of(barrier);
        if (mine) {
            cluster_copies.erase(cluster_copies.begin() + i);
            make_copy(c);
        } else {
            ++i;
        }
    }
}

static std::vector<int64_t> cluster_arrivals;
static void cluster_sync() {
    const size_t cluster = blockIdx.x / 2;
    if (cluster >= cluster_arrivals.size()) cluster_arrivals.resize(cluster + 1);
    const int64_t end = (cluster_arrivals[cluster]++ / (2 * FIBERS) + 1) * (2 * FIBERS);
    while (cluster_arrivals[cluster] < end) yield();
}

/* Runs all blocks, the first or the last first, `places` of them side by side, which take turns as
 * `seed` says, at speeds of their own. */
static void run_blocks(void (*body)(), int32_t places, uint64_t seed) {
    deliver = deliver_copies, cluster_arrivals.clear();
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
