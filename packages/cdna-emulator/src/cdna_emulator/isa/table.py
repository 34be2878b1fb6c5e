"""All instructions, one row per group with the same operands; see `cdna_emulator.isa.spec`.

Sources: AMD Instinct MI300 ("CDNA3") and CDNA4 instruction set architecture documents, chapters
"Instructions" and "Microcode formats"; operand order as LLVM prints it.
"""

from __future__ import annotations

from cdna_emulator.isa.spec import OpSpec, Unit, expand

_SALU, _SMEM, _VALU, _TRANS, _MFMA = Unit.SALU, Unit.SMEM, Unit.VALU, Unit.TRANS, Unit.MFMA
_LDS, _BUFFER, _GLOBAL, _FLAT, _SCRATCH = (
    Unit.LDS,
    Unit.BUFFER,
    Unit.GLOBAL,
    Unit.FLAT,
    Unit.SCRATCH,
)
_CONTROL = Unit.CONTROL

_COMPARE_INT = "{f,lt,eq,le,gt,ne,ge,t}"
_COMPARE_FLOAT = "{f,lt,eq,le,gt,lg,ge,o,u,nge,nlg,ngt,nle,neq,nlt,tru}"

_SCALAR = (
    (_SALU, "d:b32 s:b32", "s_mov_b32 s_brev_b32"),
    (_SALU, "d:b64 s:b64", "s_mov_b64 s_brev_b64"),
    (_SALU, "x:b32 s:b32", "s_cmov_b32", "reads_scc"),
    (_SALU, "x:b64 s:b64", "s_cmov_b64", "reads_scc"),
    (_SALU, "d:b32 s:b32", "s_not_b32 s_quadmask_b32 s_wqm_b32 s_abs_i32", "writes_scc"),
    (_SALU, "d:b64 s:b64", "s_not_b64 s_quadmask_b64 s_wqm_b64", "writes_scc"),
    (_SALU, "d:i32 s:b32", "s_bcnt{0,1}_i32_b32", "writes_scc"),
    (_SALU, "d:i32 s:b64", "s_bcnt{0,1}_i32_b64", "writes_scc"),
    (_SALU, "d:i32 s:b32", "s_ff{0,1}_i32_b32 s_flbit_i32_b32 s_flbit_i32 s_sext_i32_{i8,i16}"),
    (_SALU, "d:i32 s:b64", "s_ff{0,1}_i32_b64 s_flbit_i32_b64 s_flbit_i32_i64"),
    (_SALU, "x:b32 s:b32", "s_bitset{0,1}_b32"),
    (_SALU, "x:b64 s:b32", "s_bitset{0,1}_b64"),
    (_SALU, "d:b64 s:b32", "s_bitreplicate_b64_b32"),
    (
        _SALU,
        "d:mask s:mask",
        "s_{and,or,xor,andn1,andn2,orn1,orn2,nand,nor,xnor}_saveexec_b64 s_andn{1,2}_wrexec_b64",
        "writes_exec reads_exec writes_scc",
    ),
    (_SALU, "d:b32 s:b32", "s_movrels_b32", "reads_m0"),
    (_SALU, "d:b64 s:b64", "s_movrels_b64", "reads_m0"),
    (_SALU, "d:b32 s:b32", "s_movreld_b32", "reads_m0"),
    (_SALU, "d:b64 s:b64", "s_movreld_b64", "reads_m0"),
    (
        _SALU,
        "d:b32 s:b32 s:b32",
        "s_{add,sub}_{u32,i32} s_{min,max}_{i32,u32} s_absdiff_i32"
        " s_{and,or,xor,andn2,orn2,nand,nor,xnor}_b32 s_{lshl,lshr}_b32 s_ashr_i32"
        " s_bfe_{u32,i32} s_lshl{1,2,3,4}_add_u32",
        "writes_scc",
    ),
    (_SALU, "d:b32 s:b32 s:b32", "s_addc_u32 s_subb_u32", "reads_scc writes_scc"),
    (_SALU, "d:b32 s:b32 s:b32", "s_cselect_b32", "reads_scc"),
    (_SALU, "d:b64 s:b64 s:b64", "s_cselect_b64", "reads_scc"),
    (
        _SALU,
        "d:b32 s:b32 s:b32",
        "s_mul_i32 s_mul_hi_{u32,i32} s_bfm_b32 s_pack_{ll,lh,hh}_b32_b16",
    ),
    (_SALU, "d:b64 s:b32 s:b32", "s_bfm_b64"),
    (
        _SALU,
        "d:b64 s:b64 s:b64",
        "s_{and,or,xor,andn2,orn2,nand,nor,xnor}_b64",
        "writes_scc",
    ),
    (_SALU, "d:b64 s:b64 s:b32", "s_{lshl,lshr}_b64 s_ashr_i64 s_bfe_{u64,i64}", "writes_scc"),
    (_SALU, "d:b32 s:imm", "s_movk_i32"),
    (_SALU, "x:b32 s:imm", "s_cmovk_i32", "reads_scc"),
    (_SALU, "x:b32 s:imm", "s_addk_i32", "writes_scc"),
    (_SALU, "x:b32 s:imm", "s_mulk_i32"),
    (_SALU, "s:b32 s:imm", "s_cmpk_{eq,lg,gt,ge,lt,le}_{i32,u32}", "writes_scc"),
    (_SALU, "d:b32 s:imm", "s_getreg_b32"),
    (_SALU, "s:imm s:b32", "s_setreg_b32"),
    (_SALU, "s:imm s:imm", "s_setreg_imm32_b32"),
    (_SALU, "s:b32 s:b32", "s_cmp_{eq,lg,gt,ge,lt,le}_{i32,u32} s_bitcmp{0,1}_b32", "writes_scc"),
    (_SALU, "s:b64 s:b64", "s_cmp_{eq,lg}_u64", "writes_scc"),
    (_SALU, "s:b64 s:b32", "s_bitcmp{0,1}_b64", "writes_scc"),
    (_SALU, "s:b32 s:imm", "s_set_gpr_idx_on", "writes_m0"),
    (_SALU, "s:b32", "s_set_gpr_idx_idx", "writes_m0"),
    (_SALU, "s:imm", "s_set_gpr_idx_mode", "writes_m0"),
    (_SALU, "", "s_set_gpr_idx_off"),
    (_SALU, "d:b64", "s_getpc_b64"),
    (_CONTROL, "s:b64", "s_setpc_b64", "branch"),
    (_CONTROL, "d:b64 s:b64", "s_swappc_b64", "branch"),
    (_CONTROL, "d:b64 s:label", "s_call_b64", "branch"),
    (_CONTROL, "s:label", "s_branch", "branch"),
    (_CONTROL, "s:label", "s_cbranch_scc{0,1}", "branch reads_scc"),
    (_CONTROL, "s:label", "s_cbranch_vcc{z,nz}", "branch reads_vcc"),
    (_CONTROL, "s:label", "s_cbranch_exec{z,nz}", "branch reads_exec"),
    (_CONTROL, "s:imm?", "s_endpgm s_barrier s_icache_inv s_wakeup"),
    (_CONTROL, "s:imm", "s_nop s_sleep s_setprio s_sethalt s_trap s_sendmsg"),
    # Its operands are the counters, which the parser turns into modifiers.
    (_CONTROL, "", "s_waitcnt"),
    (
        _SMEM,
        "d:b32 s:b64 s:b32",
        "s_load_dword s_load_dwordx2 s_load_dwordx4 s_load_dwordx8 s_load_dwordx16",
        "load",
    ),
    (
        _SMEM,
        "d:b32 s:rsrc s:b32",
        "s_buffer_load_dword s_buffer_load_dwordx{2,4,8,16}",
        "load",
    ),
    (_SMEM, "d:b64", "s_memtime s_memrealtime", "load"),
    (_SMEM, "", "s_dcache_inv s_dcache_wb"),
)

_VECTOR_ONE_SOURCE = (
    (_VALU, "d:b32 s:b32", "v_mov_b32 v_not_b32 v_bfrev_b32 v_ffbh_{u32,i32} v_ffbl_b32"),
    (_VALU, "d:b64 s:b64", "v_mov_b64"),
    (_VALU, "d:b32 s:b32", "v_accvgpr_read_b32 v_accvgpr_write_b32 v_accvgpr_mov_b32"),
    (_VALU, "x:b32 x:b32", "v_swap_b32"),
    (_VALU, "x:b32 x:b32", "v_permlane{16,32}_swap_b32", "gfx950 ignores_exec"),
    (_VALU, "d:b32 s:b32", "v_readfirstlane_b32"),
    (_VALU, "d:b32 s:b32 s:b32", "v_readlane_b32", "ignores_exec"),
    (_VALU, "x:b32 s:b32 s:b32", "v_writelane_b32", "ignores_exec"),
    (_VALU, "", "v_nop"),
    (_VALU, "d:f32 s:f32", "v_{fract,trunc,ceil,rndne,floor}_f32 v_frexp_mant_f32"),
    (_VALU, "d:f16 s:f16", "v_{fract,trunc,ceil,rndne,floor}_f16 v_frexp_mant_f16"),
    (_VALU, "d:f64 s:f64", "v_{fract,trunc,ceil,rndne,floor}_f64 v_frexp_mant_f64"),
    (_VALU, "d:i32 s:f32", "v_frexp_exp_i32_f32"),
    (_VALU, "d:i32 s:f64", "v_frexp_exp_i32_f64"),
    (_VALU, "d:i16 s:f16", "v_frexp_exp_i16_f16"),
    (_TRANS, "d:f32 s:f32", "v_{exp,log,rcp,rcp_iflag,rsq,sqrt,sin,cos}_f32"),
    (_TRANS, "d:f32 s:f32", "v_{exp,log}_legacy_f32"),
    (_TRANS, "d:f16 s:f16", "v_{exp,log,rcp,rsq,sqrt,sin,cos}_f16"),
    (_TRANS, "d:f64 s:f64", "v_{rcp,rsq,sqrt}_f64"),
    (_VALU, "d:f32 s:i32", "v_cvt_f32_i32"),
    (_VALU, "d:f32 s:u32", "v_cvt_f32_u32 v_cvt_f32_ubyte{0,1,2,3}"),
    (_VALU, "d:f64 s:i32", "v_cvt_f64_i32"),
    (_VALU, "d:f64 s:u32", "v_cvt_f64_u32"),
    (_VALU, "d:f64 s:f32", "v_cvt_f64_f32"),
    (_VALU, "d:f32 s:f64", "v_cvt_f32_f64"),
    (_VALU, "d:i32 s:f32", "v_cvt_i32_f32 v_cvt_u32_f32 v_cvt_rpi_i32_f32 v_cvt_flr_i32_f32"),
    (_VALU, "d:i32 s:f64", "v_cvt_i32_f64 v_cvt_u32_f64"),
    (_VALU, "d:f16 s:f32", "v_cvt_f16_f32"),
    (_VALU, "d:f32 s:f16", "v_cvt_f32_f16"),
    (_VALU, "d:f32 s:bf16", "v_cvt_f32_bf16", "gfx950"),
    (_VALU, "d:f16 s:u16", "v_cvt_f16_u16"),
    (_VALU, "d:f16 s:i16", "v_cvt_f16_i16"),
    (_VALU, "d:i16 s:f16", "v_cvt_u16_f16 v_cvt_i16_f16 v_cvt_norm_{i16,u16}_f16"),
    (_VALU, "d:f32 s:b32", "v_cvt_f32_{fp8,bf8} v_cvt_off_f32_i4"),
    (_VALU, "d:b64 s:b32", "v_cvt_pk_f32_{fp8,bf8}"),
    (_VALU, "d:b32 s:b32", "v_sat_pk_u8_i16"),
    (_VALU, "d:b32 s:b32", "v_prng_b32", "gfx950"),
)

_VECTOR_TWO_SOURCES = (
    (
        _VALU,
        "d:f32 s:f32 s:f32",
        "v_{add,sub,subrev,mul,mul_legacy,max,min}_f32",
    ),
    (_VALU, "d:f16 s:f16 s:f16", "v_{add,sub,subrev,mul,max,min}_f16"),
    (_VALU, "d:f64 s:f64 s:f64", "v_{add,mul,max,min}_f64"),
    (_VALU, "d:f32 s:f32 s:i32", "v_ldexp_f32"),
    (_VALU, "d:f16 s:f16 s:i16", "v_ldexp_f16"),
    (_VALU, "d:f64 s:f64 s:i32", "v_ldexp_f64 v_trig_preop_f64"),
    (
        _VALU,
        "d:b32 s:b32 s:b32",
        "v_{add,sub,subrev}_u32 v_{add,sub}_i32 v_{min,max}_{i32,u32} v_{and,or,xor,xnor}_b32"
        " v_{lshlrev,lshrrev}_b32 v_ashrrev_i32 v_bfm_b32"
        " v_mul_lo_u32 v_mul_hi_{u32,i32} v_mul_{i32_i24,hi_i32_i24,u32_u24,hi_u32_u24}"
        " v_bcnt_u32_b32",
    ),
    (
        _VALU,
        "d:u16 s:u16 s:u16",
        "v_{add,sub,subrev}_u16 v_{add,sub}_i16 v_{min,max}_{i16,u16} v_mul_lo_u16"
        " v_{lshlrev,lshrrev}_b16 v_ashrrev_i16",
    ),
    (_VALU, "d:b64 s:b32 s:b64", "v_{lshlrev,lshrrev}_b64 v_ashrrev_i64"),
    (_VALU, "d:u32 s:u32 s:u32", "v_mbcnt_{lo,hi}_u32_b32"),
    (_VALU, "d:b32 d:mask s:b32 s:b32", "v_{add,sub,subrev}_co_u32"),
    (_VALU, "d:b32 d:mask s:b32 s:b32 s:mask", "v_{addc,subb,subbrev}_co_u32"),
    (_VALU, "d:b32 s:b32 s:b32 s:mask", "v_cndmask_b32"),
    (_VALU, "x:f32 s:f32 s:f32", "v_fmac_f32"),
    (_VALU, "x:f16 s:f16 s:f16", "v_mac_f16"),
    (_VALU, "x:f64 s:f64 s:f64", "v_fmac_f64"),
    (_VALU, "d:f32 s:f32 s:imm s:f32", "v_fmamk_f32"),
    (_VALU, "d:f32 s:f32 s:f32 s:imm", "v_fmaak_f32"),
    (_VALU, "d:f16 s:f16 s:imm s:f16", "v_madmk_f16"),
    (_VALU, "d:f16 s:f16 s:f16 s:imm", "v_madak_f16"),
    (_VALU, "d:pk16 s:f32 s:f32", "v_cvt_pkrtz_f16_f32 v_cvt_pknorm_{i16,u16}_f32"),
    (_VALU, "d:pk16 s:f16 s:f16", "v_pack_b32_f16 v_cvt_pknorm_{i16,u16}_f16"),
    (_VALU, "d:pk16 s:i32 s:i32", "v_cvt_pk_{i16_i32,u16_u32}"),
    (_VALU, "d:pk16 s:f32 s:f32", "v_cvt_pk_{bf16,f16}_f32", "gfx950"),
    # These keep the rest of the destination, which programs fill piece by piece: what it held
    # before need not have been written, so it does not count as read.
    (_VALU, "d:b32 s:f32 s:f32", "v_cvt_pk_{fp8,bf8}_f32"),
    (_VALU, "d:b32 s:f32 s:b32", "v_cvt_sr_{fp8,bf8}_f32"),
    (_VALU, "d:b32 s:f32 s:u32", "v_cvt_sr_{bf16,f16}_f32", "gfx950"),
    (_VALU, "x:f32 s:pk16 s:pk16", "v_dot2c_f32_f16 v_dot2c_i32_i16"),
    (_VALU, "x:f32 s:pk16 s:pk16", "v_dot2c_f32_bf16", "gfx950"),
    (_VALU, "x:i32 s:b32 s:b32", "v_dot4c_i32_i8 v_dot8c_i32_i4"),
    (_VALU, "d:mask s:f32 s:f32", f"v_cmp_{_COMPARE_FLOAT}_f32"),
    (_VALU, "d:mask s:f16 s:f16", f"v_cmp_{_COMPARE_FLOAT}_f16"),
    (_VALU, "d:mask s:f64 s:f64", f"v_cmp_{_COMPARE_FLOAT}_f64"),
    (_VALU, "d:mask s:b32 s:b32", f"v_cmp_{_COMPARE_INT}_{{i32,u32}}"),
    (_VALU, "d:mask s:u16 s:u16", f"v_cmp_{_COMPARE_INT}_{{i16,u16}}"),
    (_VALU, "d:mask s:b64 s:b64", f"v_cmp_{_COMPARE_INT}_{{i64,u64}}"),
    (_VALU, "d:mask s:f32 s:b32", "v_cmp_class_f32"),
    (_VALU, "d:mask s:f16 s:b32", "v_cmp_class_f16"),
    (_VALU, "d:mask s:f64 s:b32", "v_cmp_class_f64"),
    (_VALU, "d:mask s:f32 s:f32", f"v_cmpx_{_COMPARE_FLOAT}_f32", "writes_exec"),
    (_VALU, "d:mask s:f16 s:f16", f"v_cmpx_{_COMPARE_FLOAT}_f16", "writes_exec"),
    (_VALU, "d:mask s:f64 s:f64", f"v_cmpx_{_COMPARE_FLOAT}_f64", "writes_exec"),
    (_VALU, "d:mask s:b32 s:b32", f"v_cmpx_{_COMPARE_INT}_{{i32,u32}}", "writes_exec"),
    (_VALU, "d:mask s:u16 s:u16", f"v_cmpx_{_COMPARE_INT}_{{i16,u16}}", "writes_exec"),
    (_VALU, "d:mask s:b64 s:b64", f"v_cmpx_{_COMPARE_INT}_{{i64,u64}}", "writes_exec"),
    (_VALU, "d:mask s:f32 s:b32", "v_cmpx_class_f32", "writes_exec"),
    (_VALU, "d:mask s:f16 s:b32", "v_cmpx_class_f16", "writes_exec"),
    (_VALU, "d:mask s:f64 s:b32", "v_cmpx_class_f64", "writes_exec"),
)

_SCALED_CONVERSIONS = (
    # Those that write 8 or 16 bits keep the rest of the destination, as above.
    (_VALU, "d:b32 s:f32 s:f32 s:f32", "v_cvt_scalef32_pk_{fp8,bf8,fp4}_f32", "gfx950"),
    (_VALU, "d:b32 s:b32 s:f32", "v_cvt_scalef32_pk_{fp8,bf8,fp4}_{f16,bf16}", "gfx950"),
    (_VALU, "d:b32 s:f32 s:u32 s:f32", "v_cvt_scalef32_sr_{fp8,bf8}_f32", "gfx950"),
    (_VALU, "d:b32 s:b32 s:u32 s:f32", "v_cvt_scalef32_sr_{fp8,bf8}_{f16,bf16}", "gfx950"),
    (_VALU, "d:b32 s:b64 s:u32 s:f32", "v_cvt_scalef32_sr_pk_fp4_f32", "gfx950"),
    (_VALU, "d:b32 s:b32 s:u32 s:f32", "v_cvt_scalef32_sr_pk_fp4_{f16,bf16}", "gfx950"),
    (_VALU, "d:b32 s:b32 s:f32", "v_cvt_scalef32_{f32,f16}_{fp8,bf8}", "gfx950"),
    (_VALU, "d:b64 s:b32 s:f32", "v_cvt_scalef32_pk_f32_{fp8,bf8,fp4}", "gfx950"),
    (_VALU, "d:b32 s:b32 s:f32", "v_cvt_scalef32_pk_{f16,bf16}_{fp8,bf8,fp4}", "gfx950"),
    (_VALU, "d:b192 s:b512 s:b512 s:f32", "v_cvt_scalef32_2xpk16_{fp6,bf6}_f32", "gfx950"),
    (_VALU, "d:b192 s:b512 s:f32", "v_cvt_scalef32_pk32_{fp6,bf6}_{f16,bf16}", "gfx950"),
    (_VALU, "d:b192 s:b1024 s:u32 s:f32", "v_cvt_scalef32_sr_pk32_{fp6,bf6}_f32", "gfx950"),
    (_VALU, "d:b192 s:b512 s:u32 s:f32", "v_cvt_scalef32_sr_pk32_{fp6,bf6}_{f16,bf16}", "gfx950"),
    (_VALU, "d:b1024 s:b192 s:f32", "v_cvt_scalef32_pk32_f32_{fp6,bf6}", "gfx950"),
    (_VALU, "d:b512 s:b192 s:f32", "v_cvt_scalef32_pk32_{f16,bf16}_{fp6,bf6}", "gfx950"),
)

_VECTOR_THREE_SOURCES = (
    (
        _VALU,
        "d:f32 s:f32 s:f32 s:f32",
        "v_fma_f32 v_{min3,max3,med3}_f32 v_cubeid_f32 v_cubesc_f32 v_cubetc_f32 v_cubema_f32",
    ),
    (_VALU, "d:f32 s:f32 s:f32 s:f32", "v_{minimum3,maximum3}_f32", "gfx950"),
    (_VALU, "d:f16 s:f16 s:f16 s:f16", "v_fma_f16 v_mad_f16 v_{min3,max3,med3}_f16"),
    (_VALU, "d:f64 s:f64 s:f64 s:f64", "v_fma_f64"),
    (_VALU, "d:f32 s:f32 s:f32 s:f32", "v_div_fixup_f32"),
    (_VALU, "d:f16 s:f16 s:f16 s:f16", "v_div_fixup_f16"),
    (_VALU, "d:f64 s:f64 s:f64 s:f64", "v_div_fixup_f64"),
    (_VALU, "d:f32 s:f32 s:f32 s:f32", "v_div_fmas_f32", "reads_vcc"),
    (_VALU, "d:f64 s:f64 s:f64 s:f64", "v_div_fmas_f64", "reads_vcc"),
    (_VALU, "d:f32 d:mask s:f32 s:f32 s:f32", "v_div_scale_f32"),
    (_VALU, "d:f64 d:mask s:f64 s:f64 s:f64", "v_div_scale_f64"),
    (
        _VALU,
        "d:b32 s:b32 s:b32 s:b32",
        "v_{min3,max3,med3}_{i32,u32} v_bfe_{u32,i32} v_bfi_b32 v_alignbit_b32 v_alignbyte_b32"
        " v_perm_b32 v_add3_u32 v_add_lshl_u32 v_lshl_add_u32 v_lshl_or_b32 v_and_or_b32 v_or3_b32"
        " v_xad_u32 v_mad_{i32_i24,u32_u24} v_sad_{u8,hi_u8,u16,u32} v_msad_u8 v_lerp_u8",
    ),
    (_VALU, "d:b32 s:b32 s:b32 s:b32", "v_bitop3_b32 v_ashr_pk_{i8,u8}_i32", "gfx950"),
    (_VALU, "d:u16 s:u16 s:u16 s:u16", "v_bitop3_b16", "gfx950"),
    (_VALU, "d:b64 s:b64 s:b32 s:b64", "v_lshl_add_u64"),
    (_VALU, "d:u16 s:u16 s:u16 s:u16", "v_{min3,max3,med3}_{i16,u16} v_mad_{i16,u16,legacy_u16}"),
    (_VALU, "d:u32 s:u16 s:u16 s:u32", "v_mad_{u32_u16,i32_i16}"),
    (_VALU, "d:b32 s:f32 s:b32 s:b32", "v_cvt_pk_u8_f32"),
    (_VALU, "d:b64 d:mask s:b32 s:b32 s:b64", "v_mad_{u64_u32,i64_i32}"),
    (
        _VALU,
        "d:pk16 s:pk16 s:pk16",
        "v_pk_{add,mul,max,min}_f16 v_pk_{add,sub,max,min}_{i16,u16} v_pk_mul_lo_u16"
        " v_pk_{lshlrev,lshrrev}_b16 v_pk_ashrrev_i16",
    ),
    (_VALU, "d:pk16 s:pk16 s:pk16 s:pk16", "v_pk_fma_f16 v_pk_mad_{i16,u16}"),
    (_VALU, "d:pk16 s:pk16 s:pk16 s:pk16", "v_pk_{minimum3,maximum3}_f16", "gfx950"),
    (_VALU, "d:pkf32 s:pkf32 s:pkf32", "v_pk_{add,mul}_f32"),
    (_VALU, "d:pkf32 s:pkf32 s:pkf32 s:pkf32", "v_pk_fma_f32"),
    (_VALU, "d:pkf32 s:b64 s:b64", "v_pk_mov_b32"),
    (_VALU, "d:f32 s:pk16 s:pk16 s:f32", "v_dot2_f32_f16"),
    (_VALU, "d:f32 s:pk16 s:pk16 s:f32", "v_dot2_f32_bf16", "gfx950"),
    (_VALU, "d:i32 s:pk16 s:pk16 s:i32", "v_dot2_{i32_i16,u32_u16}"),
    (_VALU, "d:i32 s:b32 s:b32 s:i32", "v_dot4_{i32_i8,u32_u8} v_dot8_{i32_i4,u32_u4}"),
    # op_sel_hi says which sources are f16 halves of a register; constants are f32.
    (_VALU, "d:f32 s:f32 s:f32 s:f32", "v_fma_mix_f32"),
    (_VALU, "x:f16 s:f32 s:f32 s:f32", "v_fma_mix{lo,hi}_f16"),
)

_MATRIX = (
    (
        _MFMA,
        "d:b128 s:b32 s:b32 s:b128",
        "v_mfma_f32_{32x32x1_2b,16x16x1_4b,4x4x1_16b,32x32x2,16x16x4}_f32"
        " v_mfma_f32_{32x32x4_2b,16x16x4_4b,4x4x4_16b,32x32x8,16x16x16}_f16"
        " v_mfma_f32_{32x32x4_2b,16x16x4_4b,4x4x4_16b,32x32x8,16x16x16}_bf16"
        " v_mfma_i32_{32x32x4_2b,16x16x4_4b,4x4x4_16b,32x32x16,16x16x32}_i8"
        " v_mfma_f32_{16x16x32,32x32x16}_{fp8_fp8,fp8_bf8,bf8_fp8,bf8_bf8}"
        " v_mfma_f64_16x16x4_f64 v_mfma_f64_4x4x4_4b_f64",
        "ignores_exec",
    ),
    (
        _MFMA,
        "d:b128 s:b64 s:b64 s:b128",
        "v_mfma_f32_{16x16x8,32x32x4}_xf32",
        "ignores_exec gfx942",
    ),
    (
        _MFMA,
        "d:b128 s:b128 s:b128 s:b128",
        "v_mfma_f32_{16x16x32,32x32x16}_{f16,bf16} v_mfma_i32_{16x16x64,32x32x32}_i8"
        " v_mfma_f32_{16x16x128,32x32x64}_f8f6f4",
        "ignores_exec gfx950",
    ),
    (
        _MFMA,
        "d:b128 s:b128 s:b128 s:b128 s:b32 s:b32",
        "v_mfma_scale_f32_{16x16x128,32x32x64}_f8f6f4",
        "ignores_exec gfx950",
    ),
)

_LDS_LOAD = "d:b32 s:b32"
_MEMORY = (
    (
        _LDS,
        _LDS_LOAD,
        "ds_read_{b32,b64,b96,b128,u8,i8,u16,i16,u8_d16,u8_d16_hi,i8_d16,i8_d16_hi,u16_d16,"
        "u16_d16_hi} ds_read2_{b32,b64} ds_read2st64_{b32,b64}",
        "load",
    ),
    (_LDS, _LDS_LOAD, "ds_read_b64_tr_{b4,b8,b16} ds_read_b96_tr_b6", "load gfx950 ignores_exec"),
    (_LDS, "d:b32", "ds_read_addtid_b32", "load reads_m0"),
    (_LDS, "s:b32", "ds_write_addtid_b32", "store reads_m0"),
    (
        _LDS,
        "s:b32 s:b32",
        "ds_write_{b32,b64,b96,b128,b8,b16,b8_d16_hi,b16_d16_hi}",
        "store",
    ),
    (_LDS, "s:b32 s:b32 s:b32", "ds_write2_{b32,b64} ds_write2st64_{b32,b64}", "store"),
    (_LDS, "d:b32 s:b32 s:b32", "ds_permute_b32 ds_bpermute_b32", "crosslane"),
    (_LDS, "d:b32 s:b32", "ds_swizzle_b32", "crosslane"),
    (_LDS, "", "ds_nop"),
    (
        _LDS,
        "s:b32 s:b32",
        "ds_{add,sub,rsub,inc,dec}_{u32,u64} ds_{min,max}_{i32,u32,f32,i64,u64,f64}"
        " ds_{and,or,xor}_{b32,b64} ds_add_{f32,f64} ds_pk_add_{f16,bf16}",
        "store lds_atomic",
    ),
    (
        _LDS,
        "d:b32 s:b32 s:b32",
        "ds_{add,sub,rsub,inc,dec}_rtn_{u32,u64} ds_{min,max}_rtn_{i32,u32,f32,i64,u64,f64}"
        " ds_{and,or,xor}_rtn_{b32,b64} ds_add_rtn_{f32,f64} ds_pk_add_rtn_{f16,bf16}"
        " ds_wrxchg_rtn_{b32,b64}",
        "load store lds_atomic",
    ),
    (
        _LDS,
        "s:b32 s:b32 s:b32",
        "ds_cmpst_{b32,b64,f32,f64} ds_mskor_{b32,b64}",
        "store lds_atomic",
    ),
    (
        _LDS,
        "d:b32 s:b32 s:b32 s:b32",
        "ds_cmpst_rtn_{b32,b64,f32,f64} ds_mskor_rtn_{b32,b64}",
        "load store lds_atomic",
    ),
    (
        _BUFFER,
        "d:b32 s:b32 s:rsrc s:b32",
        "buffer_load_{dword,dwordx2,dwordx3,dwordx4,ubyte,sbyte,ushort,sshort,ubyte_d16,"
        "ubyte_d16_hi,sbyte_d16,sbyte_d16_hi,short_d16,short_d16_hi}",
        "load",
    ),
    (
        _BUFFER,
        "s:b32 s:b32 s:rsrc s:b32",
        "buffer_store_{dword,dwordx2,dwordx3,dwordx4,byte,short,byte_d16_hi,short_d16_hi}",
        "store",
    ),
    (
        _BUFFER,
        "x:b32 s:b32 s:rsrc s:b32",
        "buffer_atomic_{swap,cmpswap,add,sub,smin,umin,smax,umax,and,or,xor,inc,dec}"
        " buffer_atomic_{swap,cmpswap,add,sub,smin,umin,smax,umax,and,or,xor,inc,dec}_x2"
        " buffer_atomic_{add_f32,pk_add_f16,add_f64,min_f64,max_f64}",
        "load store atomic",
    ),
    (
        _BUFFER,
        "x:b32 s:b32 s:rsrc s:b32",
        "buffer_atomic_pk_add_bf16",
        "load store atomic gfx950",
    ),
    (_BUFFER, "", "buffer_wbl2 buffer_inv"),
)

_LOADS = (
    "{dword,dwordx2,dwordx3,dwordx4,ubyte,sbyte,ushort,sshort,ubyte_d16,ubyte_d16_hi,sbyte_d16,"
    "sbyte_d16_hi,short_d16,short_d16_hi}"
)
_STORES = "{dword,dwordx2,dwordx3,dwordx4,byte,short,byte_d16_hi,short_d16_hi}"
_ATOMICS = "{swap,cmpswap,add,sub,smin,umin,smax,umax,and,or,xor,inc,dec}"
_FLOAT_ATOMICS = "{add_f32,pk_add_f16,pk_add_bf16,add_f64,min_f64,max_f64}"

_ADDRESSED = (
    (_GLOBAL, "d:b32 s:b64 s:b64", f"global_load_{_LOADS}", "load"),
    (_GLOBAL, "s:b64 s:b64", "global_load_lds_{dword,ubyte,sbyte,ushort,sshort}", "load lds_dma"),
    (_GLOBAL, "s:b64 s:b64", "global_load_lds_{dwordx3,dwordx4}", "load lds_dma gfx950"),
    (_GLOBAL, "s:b64 s:b32 s:b64", f"global_store_{_STORES}", "store"),
    (
        _GLOBAL,
        "d:b32? s:b64 s:b32 s:b64",
        f"global_atomic_{_ATOMICS} global_atomic_{_ATOMICS}_x2 global_atomic_{_FLOAT_ATOMICS}",
        "load store atomic",
    ),
    (_FLAT, "d:b32 s:b64", f"flat_load_{_LOADS}", "load"),
    (_FLAT, "s:b64 s:b32", f"flat_store_{_STORES}", "store"),
    (
        _FLAT,
        "d:b32? s:b64 s:b32",
        f"flat_atomic_{_ATOMICS} flat_atomic_{_ATOMICS}_x2 flat_atomic_{_FLOAT_ATOMICS}",
        "load store atomic",
    ),
    (_SCRATCH, "d:b32 s:b32 s:b32", f"scratch_load_{_LOADS}", "load"),
    (_SCRATCH, "s:b32 s:b32 s:b32", f"scratch_store_{_STORES}", "store"),
)

_GROUPS = (
    _SCALAR,
    _VECTOR_ONE_SOURCE,
    _VECTOR_TWO_SOURCES,
    _SCALED_CONVERSIONS,
    _VECTOR_THREE_SOURCES,
    _MATRIX,
    _MEMORY,
    _ADDRESSED,
)

#: Every instruction by its name without encoding suffix.
OPS: dict[str, OpSpec] = {
    name: op for group in _GROUPS for row in group for name, op in expand(*row).items()
}
