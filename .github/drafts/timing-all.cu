// all ROUNDS s causal group [s causal group]...: every candidate in turn, round by round, the medians; SUSTAIN=1: no pause
// before a round (0.3 s of calls first). NODQ=1: no dq. Outputs of candidates of one head size are compared with the first's.
#include <cuda.h>
#include <cuda_runtime.h>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#include "backward.h"
#include "common/launch.cuh"
#define C(n) extern "C" int head_##n(int *); extern "C" double floats_##n(double); extern "C" int time_##n(const fa_backward *, const fa_device *, void *, float *);
#include "list.h"
#undef C
struct one { const char *name; int (*head)(int *); double (*floats)(double); int (*time)(const fa_backward *, const fa_device *, void *, float *); };
static const one list[] = {
#define C(n) {#n, head_##n, floats_##n, time_##n},
#include "list.h"
};
static fa_tensor whole(void *p, int64_t b, int64_t h, int64_t s, int64_t d) { return {p, {b, h, s, d}, {h * s * d, s * d, d, 1}}; }
__global__ void fill(uint16_t *x, size_t n, uint32_t seed) { for (size_t i = blockIdx.x * 256ull + threadIdx.x; i < n; i += gridDim.x * 256ull) { uint32_t z = (uint32_t)i * 2654435761u ^ seed * 977; z ^= z >> 15; z *= 2246822519u; z ^= z >> 13; z *= 3266489917u; z ^= z >> 16; float a = 0; for (int j = 0; j < 4; ++j) a += (float)((z >> (8 * j)) & 255) / 255.f - .5f; x[i] = __float_as_uint(a * 1.73f) >> 16; } }
__global__ void fillf(float *x, size_t n, float v) { for (size_t i = blockIdx.x * 256ull + threadIdx.x; i < n; i += gridDim.x * 256ull) x[i] = v; }
int main(int argc, char **argv) {
    fa_device device = {}; device.sms = 132; cudaFree(0);
    void *f; cudaDriverEntryPointQueryResult q;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &q);
    device.encode = (fa_encode_tiled)f;
    const int rounds = atoi(argv[1]), count = sizeof list / sizeof list[0];
    for (int i = 2; i + 2 < argc; i += 3) {
        const int s = atoi(argv[i]), causal = atoi(argv[i + 1]), g = atoi(argv[i + 2]), b = 16384 / s;
        std::vector<float> ms[64][3]; std::vector<uint16_t> first[256][3]; double off[64] = {};
        for (int round = -1; round < rounds; ++round)
            for (int c = 0; c < count; ++c) {
                int dv; const int d = list[c].head(&dv), h = 2048 / d, hk = h / g > 0 ? h / g : 1;
                const size_t n = (size_t)b * h * s * d;
                static uint16_t *x[8]; static float *lse; static void *w;
                if (!x[0]) { for (auto &p : x) cudaMalloc(&p, 16384 * 2048 * 4); cudaMalloc(&lse, 16384 * 64 * 4); cudaMalloc(&w, 16384ull * 2048 * 4 * 2); for (int k = 0; k < 5; ++k) fill<<<1024, 256>>>(x[k], 16384 * 2048, k); }
                if (list[c].floats((double)b * h * s) * 4 > 16384. * 2048 * 8) { printf("%s: workspace\n", list[c].name); return 1; }
                fillf<<<256, 256>>>(lse, (size_t)b * h * s, 0.5f + logf(s));
                fa_backward r = {}; fa_what &t = r.forward.what; t.dtype = FA_BF16; t.b = b, t.hq = h, t.hk = t.hv = hk, t.sq = t.sk = s, t.d = d, t.dv = dv; t.scale = 1 / sqrt((double)d);
                t.q = whole(x[0], b, h, s, d), t.k = whole(x[1], b, hk, s, d), t.v = whole(x[2], b, hk, s, dv), t.out = whole(x[3], b, h, s, dv), t.lse = whole(lse, b, h, s, 1);
                r.dout = whole(x[4], b, h, s, dv), r.dq = whole(getenv("NODQ") ? NULL : x[5], b, h, s, d), r.dk = whole(x[6], b, hk, s, d), r.dv = whole(x[7], b, hk, s, dv);
                if (causal) r.forward.masks.flags = FA_HAS_RIGHT;
                float m[3];
                if (round < 0) {
                    if (list[c].time(&r, &device, w, m)) return 1;
                    for (int k = 0; k < 3; ++k) {
                        if (k == 0 && getenv("NODQ")) continue;
                        std::vector<uint16_t> got(n / (k ? g : 1) * (k == 2 ? dv : d) / d); cudaMemcpy(got.data(), x[5 + k], got.size() * 2, cudaMemcpyDeviceToHost);
                        auto &want = first[(d * 3 + dv) % 256][k];
                        if (want.empty()) { want = got; continue; }
                        double top = 0, worst = 0;
                        for (size_t e = 0; e < got.size(); ++e) { uint32_t a = (uint32_t)got[e] << 16, z = (uint32_t)want[e] << 16; float fa, fz; memcpy(&fa, &a, 4); memcpy(&fz, &z, 4); top = std::max(top, (double)fabsf(fz)); worst = std::max(worst, fabsf(fa - fz) <= 1e30f ? (double)fabsf(fa - fz) : INFINITY); }
                        off[c] = std::max(off[c], worst / top);
                    }
                    continue;
                }
                for (int k = 0; k < (getenv("SUSTAIN") ? 40 : 3); ++k) if (list[c].time(&r, &device, w, m)) return 1;
                for (int k = 0; k < 3; ++k) ms[c][k].push_back(m[k]);
            }
        for (int c = 0; c < count; ++c) {
            int dv; const int d = list[c].head(&dv), h = 2048 / d;
            double t[3]; for (int k = 0; k < 3; ++k) { std::sort(ms[c][k].begin(), ms[c][k].end()); t[k] = ms[c][k][rounds / 2]; }
            const double fl = (6. * d + 4. * dv) * b * h * (double)s * s / (causal ? 2 : 1) / 1e9;
            printf("%-28s s%-5d %s g%d: rows %4.0f main %6.0f us (%4.0f TF) dq %4.0f, all %4.0f TF; off %.1e\n", list[c].name, s, causal ? "causal" : "full  ", g, t[0] * 1e3, t[1] * 1e3, fl / t[1], t[2] * 1e3, fl / (t[0] + t[1] + t[2]), off[c]);
        }
    }
}
