; mla_decode_bf16_m64_ps: absorbed MLA decode 576/512, bf16, 64 query rows per workgroup, driven by a work list, gfx942.
; Kernel arguments, registers and stages: hsa/src/mla/decode_common.inc and decode_m64.inc.
.amdgcn_target "amdgcn-amd-amdhsa--gfx942"
.amdhsa_code_object_version 5
.set IS_PERSISTENT, 1
.set ROWS, 64
.include "decode_common.inc"
.include "decode_softmax.inc"
.include "decode_m64.inc"
mla_decode_m64 mla_decode_bf16_m64_ps
