// Does compute-sanitizer's racecheck follow mbarriers between warps?
//
//   nvcc -arch=sm_90a -lineinfo racecheck_control.cu -o control
//   compute-sanitizer --tool racecheck ./control
//
// One warp writes a value, another reads it, in turns. Every access is ordered by two mbarriers, by
// the rules of PTX (arrive releases, a successful try_wait acquires), so there is no race. Hazards
// that are reported here are what the tool does not see, and so are reports of the same kind for
// kernels whose warps hand over shared memory in this way.
#include <cstdint>
#include <cstdio>

__device__ uint32_t address(uint64_t *barrier) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
}

__device__ void init(uint64_t *barrier) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(address(barrier)) : "memory");
}

__device__ void arrive(uint64_t *barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ void wait(uint64_t *barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(address(barrier)),
      "r"(parity)
      : "memory");
}

__global__ void hand_over(int turns, int *sum) {
  __shared__ int value[32];
  __shared__ uint64_t full, empty;
  if (threadIdx.x == 0) {
    init(&full);
    init(&empty);
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  int total = 0;
  for (int turn = 0; turn < turns; ++turn) {
    if (threadIdx.x < 32) {
      wait(&empty, (turn & 1) ^ 1);
      value[lane] = turn + lane;
      __syncwarp();
      if (lane == 0) arrive(&full);
    } else {
      wait(&full, turn & 1);
      total += value[lane];
      __syncwarp();
      if (lane == 0) arrive(&empty);
    }
  }
  if (threadIdx.x >= 32) atomicAdd(sum, total);
}

int main() {
  int *sum = nullptr;
  cudaMallocManaged(&sum, sizeof(int));
  const int turns = 100;
  hand_over<<<1, 64>>>(turns, sum);
  cudaDeviceSynchronize();
  const int expected = 32 * (turns * (turns - 1) / 2) + turns * (32 * 31 / 2);
  std::printf("sum %d, expected %d\n", *sum, expected);
  return *sum == expected ? 0 : 1;
}
