/* mask_bits.cuh - packs a bool mask for the general variants: stop 5 of 6, the launch before the
 * kernel's, in the same stream. mask_bits.h says what comes out.
 *
 * A block of 8 warps packs 64 rows of 8 * 128 keys, a byte of the map, each warp one block of keys:
 * a lane loads 4 neighbouring bytes of a row, a ballot makes 32 lanes' bytes one word. One read of
 * the mask from memory, an eighth of it written.
 */
#ifndef FASTATTN_MASK_BITS_CUH
#define FASTATTN_MASK_BITS_CUH

#include "common/launch.cuh"
#include "common/mask_bits.h"
#include "common/stream.cuh"

enum { PACK_THREADS = 256 };

struct pack_args {
    fa_tensor mask;
    fa_masks masks; /* nothing where the mask alone is packed */
    fa_mask_bits layout;
    int32_t vectors; /* 4 keys of a row can be read at once */
    int64_t tasks;
    uint8_t *map;
    uint32_t *columns, *bits;
};

/* Word `lane % 4` of a row: from the ballots on the four bytes of each lane. Byte p of lane l is
 * key 4l + p, which is bit 2 * (l / 2) + p % 2 of word 2 * (l % 2) + p / 2. */
DEVICE uint32_t bits_word(const uint32_t (&ballot)[4]) {
    const int32_t lane = threadIdx.x % 32, odd_lanes = lane / 2 % 2;
    const uint32_t even = lane & 1 ? ballot[2] : ballot[0], odd = lane & 1 ? ballot[3] : ballot[1];
    return (even >> odd_lanes & 0x55555555) | (odd >> odd_lanes & 0x55555555) << 1;
}

/* Longer than a function should be: its loads, or a block's rows, as a function of their own make
 * it 48 instructions more. */
static __global__ void __launch_bounds__(PACK_THREADS)
    pack_mask(const __grid_constant__ pack_args a) {
    constexpr int BATCH = 16; /* rows whose loads are in flight at once */
    __shared__ uint32_t states[4];
    const fa_mask_bits &n = a.layout;
    const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    wait_for_stream();
    let_next_start();
    for (int64_t task = blockIdx.x; task < a.tasks; task += gridDim.x) {
        const int32_t group = task % n.groups, part = task / n.groups % (4 * n.words);
        const int64_t plane = task / n.groups / (4 * n.words);
        const int32_t b = plane / n.heads, h = plane % n.heads;
        const fa_lengths lengths = fa_sequence_lengths(&a.masks, b, n.rows, n.keys);
        const int32_t block = 8 * part + warp, key = block * FA_BITS_KEYS + 4 * lane;
        const uint8_t *mask =
            (const uint8_t *)a.mask.data + b * a.mask.stride[0] + h * a.mask.stride[1];
        if (threadIdx.x < 4) states[threadIdx.x] = 0;
        __syncthreads();
        if (block < n.blocks) {
            uint32_t any = 0, all = ~0u;
            for (int32_t first = 0; first < FA_BITS_ROWS; first += BATCH) {
                const int32_t top = group * FA_BITS_ROWS + first;
                uint32_t bytes[BATCH];
#pragma unroll
                for (int r = 0; r < BATCH; ++r) {
                    const uint8_t *from = mask + (top + r) * a.mask.stride[2];
                    bytes[r] = 0;
                    if (top + r >= lengths.sq) continue;
                    if (a.vectors) {
                        if (key < n.keys) bytes[r] = *(const uint32_t *)(from + key);
                    } else {
#pragma unroll
                        for (int p = 0; p < 4; ++p)
                            if (key + p < n.keys)
                                bytes[r] |= (uint32_t)from[(key + p) * a.mask.stride[3]] << 8 * p;
                    }
                }
                uint32_t mine = 0; /* of rows 8k .. 8k + 7 the word that this lane stores */
#pragma unroll
                for (int r = 0; r < BATCH; ++r) {
                    const int32_t row = top + r;
                    const fa_interval seen = fa_row_interval(lengths, row);
                    uint32_t ballot[4];
#pragma unroll
                    for (int p = 0; p < 4; ++p)
                        ballot[p] =
                            __ballot_sync(~0u, (bytes[r] >> 8 * p & 0xff) != 0 &&
                                                   key + p >= seen.begin && key + p < seen.end);
                    const uint32_t bits = bits_word(ballot);
                    any |= bits;
                    if (row < lengths.sq) all &= bits;
                    if (r % 8 == lane / 4) mine = bits;
                    if (r % 8 == 7) a.bits[4 * fa_bits_at(&n, plane, block, row - 7) + lane] = mine;
                }
            }
            if (lane < 4) a.columns[4 * fa_columns_at(&n, plane, block, group) + lane] = any;
            const bool state[3] = {__any_sync(~0u, any != 0) != 0, __all_sync(~0u, all == ~0u) != 0,
                                   __all_sync(~0u, any == ~0u) != 0};
            if (lane < 3 && state[lane == 0 ? 0 : lane == 1 ? 1 : 2])
                atomicOr(&states[lane], 1u << warp);
        }
        __syncthreads();
        if (threadIdx.x < 4)
            a.map[16 * fa_map_at(&n, plane, part / 4, group) + 4 * threadIdx.x + part % 4] =
                (uint8_t)states[threadIdx.x];
        __syncthreads();
    }
}

static inline fa_status launch_pack_mask(const fa_params *p, const fa_device *device,
                                         void *workspace, fa_error *error) {
    const fa_tensor *mask = &p->scores.mask;
    pack_args a = {};
    a.mask = *mask;
    a.layout = fa_mask_bits_make(&p->what, &p->masks, &p->varlen, mask);
    if (!a.layout.mask_only) a.masks = p->masks;
    a.vectors =
        mask->stride[3] == 1 && a.layout.keys % 4 == 0 &&
        ((uintptr_t)mask->data | mask->stride[0] | mask->stride[1] | mask->stride[2]) % 4 == 0;
    a.tasks = (int64_t)a.layout.batches * a.layout.heads * a.layout.words * 4 * a.layout.groups;
    a.map = (uint8_t *)workspace;
    a.columns = (uint32_t *)((char *)workspace + a.layout.columns);
    a.bits = (uint32_t *)((char *)workspace + a.layout.bits);
    const int64_t most = 4 * (int64_t)device->sms; /* as many as are resident */
    const int32_t blocks = (int32_t)(a.tasks < most ? a.tasks : most);
    return fa_launch_kernel((const void *)pack_mask, blocks, PACK_THREADS, 0, p->where.stream,
                            device->early, &a, error);
}

#endif
