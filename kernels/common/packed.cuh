/* packed.cuh - the kernel that writes the list of tiles (packed.h): one block.
 *
 * A counting sort in two passes over the sequences, 32 to a warp and step. Each warp has
 * neighbouring sequences and counters of its own for each class, so that the order is the same
 * every time. A part of backend.cu; tests/gpu_host/fibers.h runs it on the host.
 */
#ifndef FASTATTN_PACKED_CUH
#define FASTATTN_PACKED_CUH

#include "common/packed.h"
#include "common/stream.cuh"

enum { PACKED_THREADS = 1024, PACKED_WARPS = PACKED_THREADS / 32, PACKED_FEW = 4 };

struct packed_args {
    fa_packed packed;
    fa_varlen varlen;
    fa_masks masks;
    int32_t sq, sk;
    int32_t cached; /* keys are a cache's; of its sequences those of at most `few` rows, without */
    int32_t few;    /* padding, are not listed */
};

/* The sum over this lane and those before it. */
DEVICE int32_t warp_sum(int32_t x, int32_t capacity) {
    int32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
        int32_t before = __shfl_up_sync(~0u, x, i);
        if (lane >= i) x = fa_packed_add(before, x, capacity);
    }
    return x;
}

/* [class][warp]: the number of its tiles, then the place of the next. */
typedef int32_t packed_places[FA_PACKED_CLASSES][PACKED_WARPS];

/* A place for each lane's tiles among its warp's of the same class, lane by lane; returns it. */
DEVICE int32_t take_places(packed_places &places, int32_t tiles, int32_t its_class,
                           int32_t capacity) {
    const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int32_t first = 0;
    for (uint32_t left = __ballot_sync(~0u, tiles > 0); left;) {
        const int32_t one = __shfl_sync(~0u, its_class, __ffs(left) - 1);
        const bool mine = tiles > 0 && its_class == one;
        const int32_t place = places[one][warp];
        const int32_t end = fa_packed_add(place, warp_sum(mine ? tiles : 0, capacity), capacity);
        const int32_t before = __shfl_up_sync(~0u, end, 1);
        if (mine) first = lane ? before : place;
        __syncwarp();
        if (lane == 31) places[one][warp] = end;
        __syncwarp();
        left &= ~__ballot_sync(~0u, mine);
    }
    return first;
}

static __global__ void __launch_bounds__(PACKED_THREADS)
    list_tiles(const __grid_constant__ packed_args a) {
    __shared__ packed_places places;
    __shared__ int32_t totals[FA_PACKED_CLASSES];
    const fa_packed &p = a.packed;
    const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, capacity = p.capacity;
    let_next_start();
    const int64_t steps = ((int64_t)p.b + PACKED_THREADS) / PACKED_THREADS; /* of b + 1 in all */
    for (int32_t i = threadIdx.x; i < FA_PACKED_CLASSES * PACKED_WARPS; i += PACKED_THREADS)
        (&places[0][0])[i] = 0;
    __syncthreads();
    wait_for_stream();

    for (int pass = 0; pass < 2; ++pass) {
        for (int64_t step = 0; step < steps; ++step) {
            const int64_t b = (warp * steps + step) * 32 + lane;
            int32_t tiles = 0, its_class = 0;
            if (b <= p.b) {
                const fa_sequence s =
                    a.cached ? fa_packed_cached(&p, &a.varlen, &a.masks, (int32_t)b, a.sq, a.sk)
                             : fa_packed_sequence(&p, &a.varlen, &a.masks, (int32_t)b, a.sq, a.sk);
                const bool left_out = b < p.b && fa_is_short(s, a.few);
                tiles = left_out ? 0 : fa_packed_m_blocks(&p, s);
                its_class = fa_packed_class(s.lengths.sk);
            }
            const int32_t first = take_places(places, tiles, its_class, capacity);
            if (pass == 0) continue;
            /* Each lane writes a few entries, all of them many. */
            const int32_t few = tiles <= PACKED_FEW ? tiles : 0;
            for (int32_t i = 0; i < few && first + i < capacity; ++i)
                p.entries[first + i] = fa_packed_entry{(int32_t)b, first};
            for (uint32_t left = __ballot_sync(~0u, tiles > few); left; left &= left - 1) {
                const int32_t from = __ffs(left) - 1;
                const int32_t its_first = __shfl_sync(~0u, first, from);
                const int32_t its_tiles = __shfl_sync(~0u, tiles, from);
                const int32_t its_b = __shfl_sync(~0u, (int32_t)b, from);
                const int32_t end = fa_packed_add(its_first, its_tiles, capacity);
                for (int32_t i = its_first + lane; i < end; i += 32)
                    p.entries[i] = fa_packed_entry{its_b, its_first};
            }
        }
        __syncthreads();
        if (pass == 1) break;
        /* From numbers to places: class by class, and in a class warp by warp. */
        const int32_t mine = places[warp][lane], sum = warp_sum(mine, capacity);
        if (lane == 31) totals[warp] = sum;
        __syncthreads();
        const int32_t classes = warp_sum(totals[lane], capacity);
        const int32_t start = __shfl_sync(~0u, classes, warp ? warp - 1 : 0);
        const int32_t before = __shfl_up_sync(~0u, sum, 1);
        places[warp][lane] = fa_packed_add(warp ? start : 0, lane ? before : 0, capacity);
        if (threadIdx.x == PACKED_THREADS - 1) *p.counts = fa_packed_counts{classes, 0};
        __syncthreads();
    }
}

static_assert(FA_PACKED_CLASSES == 32 && PACKED_WARPS == 32, "a class per warp, a warp per lane");

#endif
