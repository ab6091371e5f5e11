/* A stand-in for libedgetpu in tests: a TensorFlow Lite delegate that computes on the CPU what the
 * chip would. FAKE_EDGETPU chooses what it does:
 *
 *   none      claims no operator
 *   fc        claims FULLY_CONNECTED
 *   custom    claims `edgetpu-custom-op` as the fake compiler beside this file writes it
 *   wrong     the same, and computes nonsense
 *   null      opens no device
 *   crash     dies when it claims an operator, as a library of another version does
 *   hang      never opens its device
 *
 * The structures are those of TensorFlow Lite's C API (tflite/core/c/common.h), as far as they are
 * needed; what follows in them is left out only where nothing here depends on their size. */

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { int size; int data[]; } IntArray;
typedef struct { int size; float data[]; } FloatArray;
typedef struct { FloatArray *scale; IntArray *zero_point; int dimension; } Affine;
typedef struct Delegate Delegate;

typedef struct {
  int type;
  void *data;
  IntArray *dims;
  struct { float scale; int32_t zero_point; } params;
  int allocation_type;
  size_t bytes;
  const void *allocation;
  const char *name;
  Delegate *delegate;
  int buffer_handle;
  bool data_is_stale, is_variable;
  struct { int type; void *params; } quantization;
  void *sparsity;
  const IntArray *dims_signature;
} Tensor;

typedef struct {
  IntArray *inputs, *outputs, *intermediates, *temporaries;
  void *user_data, *builtin_data;
  const void *custom_initial_data;
  int custom_initial_data_size;
  Delegate *delegate;
  bool might_have_side_effect;
} Node;

typedef struct Context Context;

typedef struct {
  void *(*init)(Context *, const char *, size_t);
  void (*free)(Context *, void *);
  int (*prepare)(Context *, Node *);
  int (*invoke)(Context *, Node *);
  const char *(*profiling_string)(const Context *, const Node *);
  int32_t builtin_code;
  const char *custom_name;
  int version;
  void *external, *async_kernel;
  uint64_t inplace_operator;
  char later[64];
} Registration;

struct Context {
  size_t tensors_size;
  int (*GetExecutionPlan)(Context *, IntArray **);
  Tensor *tensors;
  void *impl;
  int (*ResizeTensor)(Context *, Tensor *, IntArray *);
  void (*ReportError)(Context *, const char *, ...);
  int (*AddTensors)(Context *, int, int *);
  int (*GetNodeAndRegistration)(Context *, int, Node **, Registration **);
  int (*ReplaceNodes)(Context *, Registration, const IntArray *, Delegate *);
};

struct Delegate {
  void *data;
  int (*Prepare)(Context *, Delegate *);
  int (*CopyFrom)(Context *, Delegate *, int, Tensor *);
  int (*CopyTo)(Context *, Delegate *, int, Tensor *);
  void (*FreeBuffer)(Context *, Delegate *, int *);
  int64_t flags;
  void *opaque;
};

typedef struct {
  Delegate *delegate;
  IntArray *nodes, *inputs, *outputs;
} DelegateParams;

/* What a kernel multiplies with: y = round(x W' m), W int8 [rows, columns]. */
typedef struct {
  int input, output, rows, columns;
  const float *multipliers;
  const int8_t *weights;
  float *owned;
} Product;

static const char *mode(void) {
  const char *value = getenv("FAKE_EDGETPU");
  return value ? value : "custom";
}

static bool is(const char *name) { return strcmp(mode(), name) == 0; }

static void *init(Context *context, const char *buffer, size_t length) {
  (void)length;
  const DelegateParams *params = (const DelegateParams *)buffer;
  Node *node;
  Registration *registration;
  if (context->GetNodeAndRegistration(context, params->nodes->data[0], &node, &registration))
    return NULL;
  Product *product = calloc(1, sizeof *product);
  product->input = node->inputs->data[0];
  product->output = node->outputs->data[0];
  if (is("fc")) {
    Tensor *x = &context->tensors[product->input], *y = &context->tensors[product->output];
    Tensor *weights = &context->tensors[node->inputs->data[1]];
    const FloatArray *scales = ((Affine *)weights->quantization.params)->scale;
    product->rows = weights->dims->data[0];
    product->columns = weights->dims->data[1];
    product->weights = weights->data;
    product->owned = malloc(sizeof(float) * product->rows);
    for (int row = 0; row < product->rows; row++)
      product->owned[row] = x->params.scale * scales->data[row] / y->params.scale;
    product->multipliers = product->owned;
    return product;
  }
  /* int32 rows, columns; float multipliers [rows]; int8 weights */
  const int32_t *header = node->custom_initial_data;
  product->rows = header[0];
  product->columns = header[1];
  product->multipliers = (const float *)(header + 2);
  product->weights = (const int8_t *)(product->multipliers + product->rows);
  return product;
}

static void release(Context *context, void *data) {
  (void)context;
  if (data) free(((Product *)data)->owned);
  free(data);
}

static int prepare(Context *context, Node *node) {
  Product *product = node->user_data;
  if (!product) return 1;
  Tensor *x = &context->tensors[product->input];
  IntArray *dims = malloc(sizeof *dims + 2 * sizeof(int));
  dims->size = 2;
  dims->data[0] = x->dims->data[0];
  dims->data[1] = product->rows;
  return context->ResizeTensor(context, &context->tensors[product->output], dims);
}

static int invoke(Context *context, Node *node) {
  const Product *product = node->user_data;
  const Tensor *x = &context->tensors[product->input];
  int8_t *y = context->tensors[product->output].data;
  for (int at = 0; at < x->dims->data[0]; at++)
    for (int row = 0; row < product->rows; row++) {
      const int8_t *codes = (const int8_t *)x->data + (size_t)at * product->columns;
      const int8_t *weights = product->weights + (size_t)row * product->columns;
      int32_t sum = 0;
      for (int column = 0; column < product->columns; column++) sum += codes[column] * weights[column];
      float value = rintf(sum * product->multipliers[row]);
      if (is("wrong")) value = -value;
      *y++ = (int8_t)(value > 127 ? 127 : value < -128 ? -128 : value);
    }
  return 0;
}

static int claim(Context *context, Delegate *delegate) {
  IntArray *plan;
  if (is("none")) return 0;
  if (context->GetExecutionPlan(context, &plan)) return 1;
  IntArray *claimed = calloc(1, sizeof *claimed + plan->size * sizeof(int));
  for (int at = 0; at < plan->size; at++) {
    Node *node;
    Registration *registration;
    if (context->GetNodeAndRegistration(context, plan->data[at], &node, &registration)) return 1;
    bool ours = is("fc") ? registration->builtin_code == 9
                         : registration->custom_name &&
                               strcmp(registration->custom_name, "edgetpu-custom-op") == 0;
    if (ours) claimed->data[claimed->size++] = plan->data[at];
  }
  if (claimed->size && is("crash")) *(volatile int *)8 = 1;
  Registration kernel = {
      .init = init, .free = release, .prepare = prepare, .invoke = invoke, .version = 1};
  kernel.custom_name = "FakeEdgeTpu";
  int status = context->ReplaceNodes(context, kernel, claimed, delegate);
  free(claimed);
  return status;
}

Delegate *tflite_plugin_create_delegate(
    char **keys, char **values, size_t count, void (*report)(const char *)) {
  if (is("hang")) pause();
  if (is("null") || count != 1 || strcmp(keys[0], "device") || !*values[0]) {
    report("no such device");
    return NULL;
  }
  Delegate *delegate = calloc(1, sizeof *delegate);
  delegate->Prepare = claim;
  delegate->flags = 1; /* sizes may change between calls */
  return delegate;
}

void tflite_plugin_destroy_delegate(Delegate *delegate) { free(delegate); }
