; mla_decode_bf16_m16_ps: absorbed MLA decode 576/512, bf16, 16 query rows per workgroup, driven by a work list, gfx950.
; Kernel arguments, registers and stages: hsa/src/mla/decode_common.inc and decode_m16.inc.
.amdgcn_target "amdgcn-amd-amdhsa--gfx950"
.amdhsa_code_object_version 5
.set IS_PERSISTENT, 1
.set ROWS, 16
.include "decode_common.inc"
.include "decode_softmax.inc"
.include "decode_values_gfx950.inc"
.include "decode_m16.inc"
mla_decode_m16 mla_decode_bf16_m16_ps
