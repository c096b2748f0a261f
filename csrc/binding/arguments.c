/* arguments.c - the arguments of a public function, each by its name.
 *
 * Names, defaults and documentation of the public functions are written once, in
 * python/fastattn/_attention.py. Here is where in `arguments` each name goes.
 */
#include "arguments.h"

#include <stddef.h>
#include <string.h>

typedef struct parameter {
    const char *name;
    size_t field;
} parameter;

#define P(name) {#name, offsetof(arguments, name)}

/* What several functions have, in the same order. */
#define QKV P(q), P(k), P(v)
#define FORWARD_RESULTS P(return_lse), P(out)
#define GRADIENTS \
    P(need_dq), P(need_dk), P(need_dv), P(need_dmask), P(need_dsink), P(dq), P(dk), P(dv)
#define LENGTHS P(q_offset), P(q_lengths), P(k_lengths), P(k_start)
#define SEQUENCES                                                                     \
    P(cu_seqlens_q), P(cu_seqlens_k), P(max_seqlen_q), P(max_seqlen_k), P(seqused_q), \
        P(seqused_k), P(q_offset), P(page_table)
#define SCORES P(mask), P(softcap), P(alibi_slopes), P(sink), P(scale), P(dropout_p), P(seed)
#define CACHE P(k_cache), P(v_cache), P(cache_seqlens)
#define PLACES P(page_table), P(cache_batch_idx), P(cache_leftpad)
#define ROTARY P(rotary_cos), P(rotary_sin), P(rotary_interleaved)
#define EXECUTION P(deterministic), P(batch_invariant), P(backend)

static const parameter attention[] = {QKV,    P(causal), P(window),       LENGTHS,
                                      SCORES, P(layout), FORWARD_RESULTS, EXECUTION};

static const parameter sdpa[] = {P(query),     P(key),       P(value), P(attn_mask),
                                 P(dropout_p), P(is_causal), P(scale), P(enable_gqa)};

static const parameter varlen[] = {QKV,    SEQUENCES,       P(causal), P(window),
                                   SCORES, FORWARD_RESULTS, EXECUTION};

static const parameter backward[] = {P(dout),   QKV,       P(out),  P(lse), P(dlse),   GRADIENTS,
                                     P(causal), P(window), LENGTHS, SCORES, P(layout), EXECUTION};

static const parameter varlen_backward[] = {P(dout),   QKV,     P(out),    P(lse),
                                            SEQUENCES, P(dlse), GRADIENTS, P(causal),
                                            P(window), SCORES,  EXECUTION};

static const parameter kvcache[] = {P(q),
                                    CACHE,
                                    P(k),
                                    P(v),
                                    PLACES,
                                    P(cu_seqlens_q),
                                    P(max_seqlen_q),
                                    ROTARY,
                                    P(k_scale),
                                    P(v_scale),
                                    P(causal),
                                    P(num_splits),
                                    P(layout),
                                    P(return_lse),
                                    P(return_mass),
                                    P(window),
                                    P(softcap),
                                    P(alibi_slopes),
                                    P(sink),
                                    P(scale),
                                    P(batch_invariant),
                                    P(out),
                                    P(backend)};

#define LISTS P(counts), P(q_block), P(k_block), P(gate), P(key_gate), P(window_union)
#define OF_LISTS P(softcap), P(sink), P(scale)
#define LIST_RESULTS P(return_lse), P(return_mass), P(out), P(deterministic), P(backend)

static const parameter sparse[] = {QKV,       P(key_lists), LISTS,    P(validate), P(causal),
                                   P(window), LENGTHS,      OF_LISTS, P(layout),   LIST_RESULTS};

static const parameter sparse_varlen[] = {
    QKV,       P(key_lists), P(cu_seqlens_q), P(cu_seqlens_k), P(max_seqlen_q), P(max_seqlen_k),
    LISTS,     P(validate),  P(seqused_q),    P(seqused_k),    P(q_offset),     P(causal),
    P(window), OF_LISTS,     LIST_RESULTS};

static const parameter sparse_backward[] = {
    P(dout),         QKV,          P(out),          P(lse),           P(key_lists),
    P(dlse),         P(need_dq),   P(need_dk),      P(need_dv),       P(need_dgate),
    P(need_dsink),   LISTS,        P(cu_seqlens_q), P(cu_seqlens_k),  P(max_seqlen_q),
    P(max_seqlen_k), P(seqused_q), P(seqused_k),    P(causal),        P(window),
    LENGTHS,         OF_LISTS,     P(layout),       P(deterministic), P(backend)};

#define SELECTION P(key_gate), P(keep_all)
#define ENDS P(cu_seqlens_q), P(cu_seqlens_k), P(max_seqlen_q), P(max_seqlen_k)

static const parameter sparsek[] = {
    QKV,       P(scores),     P(k_keep),           P(window), SELECTION,        LENGTHS,   OF_LISTS,
    P(layout), P(return_lse), P(return_selection), P(out),    P(deterministic), P(backend)};

static const parameter sparsek_varlen[] = {
    QKV,          P(scores),        P(k_keep),   ENDS,     P(window),     SELECTION,
    P(seqused_q), P(seqused_k),     P(q_offset), OF_LISTS, P(return_lse), P(return_selection),
    P(out),       P(deterministic), P(backend)};

static const parameter sparsek_backward[] = {
    P(dout),    QKV,        P(scores),        P(k_keep),       P(out),
    P(lse),     P(tau),     P(ends),          P(window),       P(dlse),
    P(need_dq), P(need_dk), P(need_dv),       P(need_dscores), P(need_dsink),
    SELECTION,  ENDS,       P(seqused_q),     P(seqused_k),    LENGTHS,
    OF_LISTS,   P(layout),  P(deterministic), P(backend)};

#define COUNT(table) (sizeof(table) / sizeof *(table))

static const struct {
    const char *name;
    const parameter *parameters;
    Py_ssize_t count;
} functions[FUNCTIONS] = {
    [ATTENTION] = {"attention", attention, COUNT(attention)},
    [SDPA] = {"scaled_dot_product_attention", sdpa, COUNT(sdpa)},
    [VARLEN] = {"attention_varlen", varlen, COUNT(varlen)},
    [BACKWARD] = {"attention_backward", backward, COUNT(backward)},
    [VARLEN_BACKWARD] = {"attention_varlen_backward", varlen_backward, COUNT(varlen_backward)},
    [KVCACHE] = {"attention_kvcache", kvcache, COUNT(kvcache)},
    [SPARSE] = {"attention_sparse", sparse, COUNT(sparse)},
    [SPARSE_VARLEN] = {"attention_sparse_varlen", sparse_varlen, COUNT(sparse_varlen)},
    [SPARSE_BACKWARD] = {"attention_sparse_backward", sparse_backward, COUNT(sparse_backward)},
    [SPARSEK] = {"sparsek_attention", sparsek, COUNT(sparsek)},
    [SPARSEK_VARLEN] = {"sparsek_attention_varlen", sparsek_varlen, COUNT(sparsek_varlen)},
    [SPARSEK_BACKWARD] = {"sparsek_attention_backward", sparsek_backward, COUNT(sparsek_backward)},
};

_Static_assert(COUNT(backward) <= MAX_PARAMETERS && COUNT(varlen_backward) <= MAX_PARAMETERS,
               "signature has no room for them");

int arguments_function(const char *name) {
    int which = 0;
    while (which < FUNCTIONS && strcmp(name, functions[which].name)) which++;
    return which;
}

static PyObject **field_of(arguments *a, size_t offset) {
    return (PyObject **)((char *)a + offset);
}

int arguments_learn(signature *s, PyObject *text, PyObject *names, PyObject *values,
                    Py_ssize_t positional, PyCFunction entry) {
    const char *name = PyBytes_AsString(text);
    const Py_ssize_t count = PyTuple_Size(names), required = count - PyTuple_Size(values);
    const int which = arguments_function(name);
    int known = which < FUNCTIONS && count == functions[which].count && required >= 0;
    for (Py_ssize_t i = 0; i < count && known; i++) {
        s->name[i] = PyTuple_GetItem(names, i);
        s->field[i] = functions[which].parameters[i].field;
        known = !PyUnicode_CompareWithASCIIString(s->name[i], functions[which].parameters[i].name);
        *field_of(&s->defaults, s->field[i]) =
            i < required ? NULL : PyTuple_GetItem(values, i - required);
    }
    if (!known) {
        PyErr_Format(PyExc_TypeError, "_C has no function %s%R", name, names);
        return -1;
    }
    if (!(s->function = PyUnicode_InternFromString(name))) return -1;
    s->count = count, s->required = required, s->positional = positional;
    s->text = Py_NewRef(text), s->names = Py_NewRef(names), s->values = Py_NewRef(values);
    s->method = (PyMethodDef){name, entry, METH_FASTCALL | METH_KEYWORDS, name + strlen(name) + 1};
    return 0;
}

/* The place of a keyword in the signature; count: none. */
static Py_ssize_t find(const signature *s, PyObject *keyword) {
    Py_ssize_t at = 0;
    while (at < s->count && s->name[at] != keyword) at++;
    if (at == s->count) /* a keyword that was made at run time is not interned */
        for (at = 0; at < s->count && PyUnicode_Compare(s->name[at], keyword); at++) continue;
    return at;
}

int arguments_parse(const signature *s, PyObject *const *given, Py_ssize_t count,
                    PyObject *keywords, arguments *out) {
    const char *name = s->method.ml_name;
    if (count > s->positional) {
        PyErr_Format(PyExc_TypeError, "%s() takes %zd positional arguments but %zd were given",
                     name, s->positional, count);
        return -1;
    }
    size_t size = sizeof *out;
    __asm__("" : "+r"(size)); /* by the C library, as fa_clear() */
    memcpy(out, &s->defaults, size);
    for (Py_ssize_t i = 0; i < count; i++) *field_of(out, s->field[i]) = given[i];
    const Py_ssize_t extra = keywords ? PyTuple_Size(keywords) : 0;
    for (Py_ssize_t i = 0; i < extra; i++) {
        PyObject *keyword = PyTuple_GetItem(keywords, i);
        const Py_ssize_t at = find(s, keyword);
        if (at == s->count || at < count) {
            PyErr_Format(PyExc_TypeError,
                         at < count ? "%s() got multiple values for argument '%U'"
                                    : "%s() got an unexpected keyword argument '%U'",
                         name, keyword);
            return -1;
        }
        *field_of(out, s->field[at]) = given[count + i];
    }
    for (Py_ssize_t i = count; i < s->required; i++)
        if (!*field_of(out, s->field[i])) {
            PyErr_Format(PyExc_TypeError, "%s() missing required argument '%U'", name, s->name[i]);
            return -1;
        }
    return 0;
}

PyObject *arguments_pack(const signature *s, const arguments *a) {
    PyObject *tuple = PyTuple_New(s->count);
    for (Py_ssize_t i = 0; i < s->count && tuple; i++) {
        PyObject *value = *(PyObject *const *)((const char *)a + s->field[i]);
        if (PyTuple_SetItem(tuple, i, Py_NewRef(value)) < 0) Py_CLEAR(tuple);
    }
    return tuple;
}

int arguments_unpack(const signature *s, PyObject *tuple, arguments *out) {
    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != s->count) {
        PyErr_Format(PyExc_TypeError, "%s() takes a tuple of %zd arguments", s->method.ml_name,
                     s->count);
        return -1;
    }
    memcpy(out, &s->defaults, sizeof *out);
    for (Py_ssize_t i = 0; i < s->count; i++)
        *field_of(out, s->field[i]) = PyTuple_GetItem(tuple, i);
    return 0;
}
