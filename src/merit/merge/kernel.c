/* The linear merge of one piece, compiled: out = round(sum_k c_k x_k), each element the exact real value rounded once.
 *
 * The same steps as arithmetic.Combination takes in NumPy, which explains them: a fast sum with an error bound e; elements
 * that round alike at s - e and s + e are done, the others are decided by error-free transformations. What these cannot
 * decide either goes back to the caller. bfloat16 and float32 only; compiled on first use by native.py, which also says
 * what happens where that is impossible. Needs IEEE arithmetic: never compile it with -ffast-math.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if (FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16) || defined(__FAST_MATH__)
#error "needs float and double operations that round once"
#endif

enum { BF16, F32, CHUNK = 512 };

struct terms {
    const double *coefficients, *numerators; /* c_k = numerators[k] / denominator */
    double denominator;                      /* 0: products of numerators and operands may not be exact */
    int32_t count, copyable;                 /* copyable: the c_k sum to one, all dtypes are the output's */
    int32_t kind;                            /* of the output */
    const int32_t *kinds;                    /* of the operands */
};

static float to_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static uint32_t to_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }
static size_t width(int32_t kind) { return kind == BF16 ? 2 : 4; }

static double element(const void *x, int32_t kind, int64_t i)
{
    return kind == BF16 ? to_float((uint32_t)((const uint16_t *)x)[i] << 16) : ((const float *)x)[i];
}

/* Largest |x|; infinity or NaN where one is not finite. */
static float magnitude(const void *x, int32_t kind, int64_t n)
{
    if (kind == BF16) {
        const uint16_t *bits = x;
        uint16_t top = 0;
        for (int64_t i = 0; i < n; i++) {
            uint16_t b = bits[i] & 0x7FFF;
            top = b > top ? b : top;
        }
        return to_float((uint32_t)top << 16);
    }
    const uint32_t *bits = x;
    uint32_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t b = bits[i] & 0x7FFFFFFF;
        top = b > top ? b : top;
    }
    return to_float(top);
}

/* Adding half a step to the bit pattern and cutting rounds to nearest; a tie, or an overflow, is always in doubt. */
#define ROUND_BF16(low, high)                                                                                          \
    uint32_t a = to_bits(low) + 0x8000, b = to_bits(high) + 0x8000;                                                    \
    uint16_t rounded = a >> 16, unsure = ((a ^ b) >> 16) | ((a & 0x7F800000) == 0x7F800000);                           \
    out[i] = rounded;                                                                                                  \
    doubt[i] = unsure;                                                                                                 \
    any |= unsure;

/* All bfloat16: the sum in float32. */
static int narrow(const struct terms *t, const void *const *x, double spread, int64_t n, uint16_t *restrict out,
                  uint16_t *restrict doubt)
{
    float sum[CHUNK];
    for (int32_t k = 0; k < t->count; k++) {
        const uint16_t *restrict v = x[k];
        const float c = (float)t->coefficients[k];
        if (k == 0)
            for (int64_t i = 0; i < n; i++) sum[i] = c * to_float((uint32_t)v[i] << 16);
        else
            for (int64_t i = 0; i < n; i++) sum[i] += c * to_float((uint32_t)v[i] << 16);
    }
    const float e = (float)((t->count + 5) * 0x1p-24 * spread + (t->count + 2) * 0x1p-149);
    uint16_t any = 0;
    for (int64_t i = 0; i < n; i++) {
        ROUND_BF16(sum[i] - e, sum[i] + e)
    }
    return any != 0;
}

/* Any dtypes: the sum in float64. */
static int wide(const struct terms *t, const void *const *x, double spread, int64_t n, void *result,
                uint16_t *restrict doubt)
{
    double sum[CHUNK];
    for (int64_t i = 0; i < n; i++) sum[i] = -0.0; /* what changes no sum, of zeros either */
    for (int32_t k = 0; k < t->count; k++) {
        const double c = t->coefficients[k];
        if (t->kinds[k] == BF16) {
            const uint16_t *restrict v = x[k];
            for (int64_t i = 0; i < n; i++) sum[i] += c * to_float((uint32_t)v[i] << 16);
        } else {
            const float *restrict v = x[k];
            for (int64_t i = 0; i < n; i++) sum[i] += c * v[i];
        }
    }
    const double e = (t->count + 4) * 0x1p-53 * spread;
    uint16_t any = 0;
    if (t->kind == BF16) {
        uint16_t *restrict out = result;
        for (int64_t i = 0; i < n; i++) {
            double d = e + fabs(sum[i]) * 0x1p-23 + 0x1p-148; /* the rounding to float, too */
            ROUND_BF16((float)(sum[i] - d), (float)(sum[i] + d))
        }
    } else {
        float *restrict out = result;
        for (int64_t i = 0; i < n; i++) {
            float low = (float)(sum[i] - e), high = (float)(sum[i] + e);
            uint32_t a = to_bits(low), b = to_bits(high);
            uint16_t unsure = (a != b) | ((a & 0x7F800000) == 0x7F800000);
            out[i] = low;
            doubt[i] = unsure;
            any |= unsure;
        }
    }
    return any != 0;
}

/* One element by exact arithmetic; 0 where float64 does not hold every step, or the result overflows. */
static int decide(const struct terms *t, const void *const *x, int64_t i, void *result)
{
    double sum = 0;
    if (!t->denominator)
        return 0;
    for (int32_t k = 0; k < t->count; k++) {
        double product = t->numerators[k] * element(x[k], t->kinds[k], i);
        if (k == 0) {
            sum = product;
            continue;
        }
        double total = sum + product, part = total - sum;
        if ((sum - (total - part)) + (product - part) != 0)
            return 0;
        sum = total;
    }
    double y = sum / t->denominator, rest = fma(-y, t->denominator, sum);
    uint64_t bits;
    memcpy(&bits, &y, 8);
    if (rest != 0 && !(bits & 1)) /* round to odd: no later rounding can hit a tie that is none */
        y = nextafter(y, copysign(INFINITY, rest));
    float single = (float)y;
    uint32_t word = to_bits(single);
    if (t->kind == F32) {
        ((float *)result)[i] = single;
    } else {
        uint32_t low = word & 0xFFFF, up = low > 0x8000 || (low == 0x8000 && (word & 0x10000));
        if (low == 0x8000 && fabs(y) != fabs((double)single))
            up = fabs(y) > fabs((double)single);
        word = ((word >> 16) + up) << 16;
        ((uint16_t *)result)[i] = word >> 16;
    }
    return (word & 0x7F800000) != 0x7F800000;
}

static int identical(const struct terms *t, const void *const *x, size_t bytes)
{
    for (int32_t k = 1; k < t->count; k++)
        if (memcmp(x[0], x[k], bytes))
            return 0;
    return 1;
}

/* Returns how many elements stay undecided (their positions in `undecided`), or -1 - k: operand k is not finite. */
#ifdef _WIN32
__declspec(dllexport)
#endif
int64_t merit_combine(const struct terms *t, int64_t n, const void *const *operands, void *result, int64_t *undecided)
{
    const void *x[64];
    uint16_t doubt[CHUNK] = {0};
    int64_t left = 0;
    int narrows = t->kind == BF16;
    for (int32_t k = 0; k < t->count; k++) {
        double c = fabs(t->coefficients[k]); /* one that is subnormal in float32 would have lost digits */
        narrows &= t->kinds[k] == BF16 && (c == 0 || c >= 0x1p-126);
    }
    for (int64_t start = 0; start < n; start += CHUNK) {
        int64_t m = n - start < CHUNK ? n - start : CHUNK;
        char *out = (char *)result + start * width(t->kind);
        double spread = 0; /* sum_k |c_k| max |x_k| */
        for (int32_t k = 0; k < t->count; k++) {
            x[k] = (const char *)operands[k] + start * width(t->kinds[k]);
            float top = magnitude(x[k], t->kinds[k], m);
            if (!(top < INFINITY))
                return -1 - k;
            spread += fabs(t->coefficients[k]) * top;
        }
        if (t->copyable && identical(t, x, m * width(t->kind))) {
            memcpy(out, x[0], m * width(t->kind));
            continue;
        }
        int any = narrows && spread < 0x1p126 ? narrow(t, x, spread, m, (uint16_t *)out, doubt)
                                               : wide(t, x, spread, m, out, doubt);
        for (int64_t i = 0; any && i < m; i += 8) {
            uint64_t pair[2]; /* few are in doubt: eight at a time are skipped */
            memcpy(pair, doubt + i, sizeof pair);
            if (!(pair[0] | pair[1]))
                continue;
            for (int64_t j = i; j < i + 8 && j < m; j++)
                if (doubt[j] && !decide(t, x, j, out))
                    undecided[left++] = start + j;
        }
    }
    return left;
}
