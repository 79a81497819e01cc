/* Fused multiply-adds on registers alone: the most that this processor's floating-point units can do on one core. */
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define CHAINS 12 /* enough to hide the latency, few enough for 16 registers */

typedef float lanes __attribute__((vector_size(BYTES)));

/* The number of floating-point operations that one step takes. */
long step_flops(void) { return 2 * CHAINS * (BYTES / (long)sizeof(float)); }

float run(long steps) {
  lanes chain[CHAINS], scale = {0}, shift = {0};
  scale += 0.999f;
  shift += 0.001f;
  for (int i = 0; i < CHAINS; ++i) chain[i] = shift * (float)i;
  for (long step = 0; step < steps; ++step)
    for (int i = 0; i < CHAINS; ++i) chain[i] = chain[i] * scale + shift;
  float sum = 0;
  for (int i = 0; i < CHAINS; ++i) sum += chain[i][0];
  return sum;
}
