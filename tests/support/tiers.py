"""Tests that are left to `make test-all`: further cases of kinds of which `make test` has
one. Each entry is the end of a test's name.
"""

LATER = (
    # Families: each keeps a mesh of its own kind, all together every kind
    *(
        f"test_convert_models.py::test_a_mesh_equals_diffusers[{case}]"
        for case in (
            "tp1-cp2-ulysses-dp1-wan",
            "tp1-cp2-ulysses-dp1-flux",
            "tp1-cp2-ulysses-dp1-hunyuan",
            "tp1-cp2-all_gather-dp1-sd3",
            "tp1-cp2-all_gather-dp1-hunyuan",
            "tp2-cp1-dp1-wan",
            "tp2-cp1-dp1-sd3",
            "tp2-cp1-dp1-hunyuan",
            "tp2-sp-cp1-dp1-sd3",
            "tp2-sp-cp1-dp1-flux",
            "pp2-wan",
            "pp2-sd3",
            "pp2-flux",
        )
    ),
    "test_convert_models.py::test_verify_on_a_mesh[flux]",
    "test_convert_models.py::test_apt_on_two_ranks_equals_apt_on_one[wan]",
    "test_convert_models.py::test_apt_in_a_pipeline_equals_apt_on_one[sd3]",
    *(
        f"test_first_frame.py::test_a_mesh_equals_diffusers[{case}]"
        for case in ("0-tp1-cp2-ulysses-dp1", "0-tp2-cp1-dp1", "1-tp1-cp2-all_gather-dp1", "1-tp2-cp1-dp1")
    ),
    "test_first_frame.py::test_a_method_on_two_ranks_equals_one[consistency]",
    "test_image_to_video.py::test_in_a_pipeline_equals_one[consistency]",
    "test_image_to_video.py::test_from_pipeline_to_pipeline[plain]",
    "test_image_to_video.py::test_apt_on_two_ranks_equals_apt_on_one",
    # Meshes: one of four ranks
    *(
        f"test_parity_matrix.py::test_apt_on_mixed_data[{case}]"
        for case in ("tp1-cp1-dp4", "tp1-cp4-all_gather-dp1", "tp4-sp-cp1-dp1")
    ),
    "test_parity_matrix.py::test_rows_padded_for_fp8_change_nothing[cp2-mixed]",
    *(
        f"test_parity_matrix.py::test_low_precision_on_two_ranks[{case}]"
        for case in (
            "tp1-cp2-ulysses-dp1-float32",
            "tp2-sp-cp1-dp1-float32",
            "tp1-cp1-dp2-float32",
            "tp1-cp2-all_gather-dp1-bfloat16",
        )
    ),
    "test_parity_matrix.py::test_uniform_data_on_two_ranks[tp1-cp1-dp2-images]",
    "test_parity_matrix.py::test_the_other_methods_on_two_ranks[tp1-cp1-dp2-flow]",
    *(
        f"test_parity_matrix.py::test_a_deliberate_bug_is_noticed[{case}]"
        for case in ("a dropped reduce-scatter", "a doubled gradient of the query heads")
    ),
    # Pipelines
    *(
        f"test_parity_matrix.py::test_apt_in_a_pipeline[{case}]"
        for case in ("pp2-tp1-cp1-dp2", "pp2-tp1-cp2-ulysses-dp1")
    ),
    *(
        f"test_parity_matrix.py::test_variants_of_apt_in_a_pipeline[{case}]"
        for case in ("frozen backbone", "single modulation", "shallow")
    ),
    *(f"test_parity_matrix.py::test_every_schedule_computes_the_same[{case}]" for case in ("line", "gpipe")),
    *(
        f"test_parity_matrix.py::test_the_other_methods_in_a_pipeline[{case}]"
        for case in ("flow-interleaved", "consistency-1f1b")
    ),
    "test_parity_matrix.py::test_reused_fakes_in_a_pipeline[pp2-tp1-cp1-dp1-1]",
    "test_parity_matrix.py::test_low_precision_in_a_pipeline[pp2-tp1-cp1-dp1-float32]",
    "test_pipeline.py::test_weight_gradients_come_when_the_schedule_says[1f1b]",
    # Kernels: sizes and element types of which the interpreter makes seconds
    "test_kernels_model.py::test_apt_with_kernels_equals_apt_with_references[uniform]",
    "test_kernels_attention.py::test_a_video_of_46800_tokens[dtype0]",
    "test_kernels_attention.py::test_a_video_of_46800_tokens[dtype1]",
    "test_kernels_attention.py::test_attention[lengths3-1-1-64-dtype1]",
    "test_kernels_attention.py::test_attention[lengths4-1-3-24-dtype0]",
    "test_kernels_attention.py::test_attention[lengths6-3-3-24-dtype1]",
    "test_kernels_attention.py::test_pooling[lengths3-1-64-130-dtype0]",
    "test_kernels_attention.py::test_projected_pooling[lengths3-1-64-130-dtype0]",
    "test_kernels_pointwise.py::test_gated_residual[lengths3-96-dtype0]",
    "test_kernels_pointwise.py::test_modulated_norm[lengths3-96-layer-dtype0]",
    "test_kernels_pointwise.py::test_modulated_norm[lengths3-96-rms-dtype1]",
    "test_kernels_rope.py::test_a_model_with_kernels_equals_one_with_references[uniform]",
    "test_kernels_rope.py::test_a_model_with_kernels_equals_one_with_references[recomputed]",
    "test_kernels_rope.py::test_packed_samples[apart-1-3-dtype1]",
    "test_kernels_rope.py::test_packed_samples[by_rank-2-4-dtype0]",
    "test_kernels_rope.py::test_packed_samples[by_rank-3-3-dtype1]",
    "test_kernels_rope.py::test_packed_samples[keys_values-1-2-dtype0]",
    "test_kernels_rope.py::test_samples_of_one_length[1-63-1000-1-40-dtype1]",
    "test_kernels_rope.py::test_samples_of_one_length[2-5-63-3-24-dtype0]",
    "test_schedule.py::test_the_bubble_of_the_interleaved_schedule[16-32-cost3-0.006]",
    # Training
    *(
        f"test_train.py::test_ablations_on_two_ranks_equal_one[{case}]"
        for case in ("last-layer head", "text to the end")
    ),
    *(f"test_guards.py::test_a_bad_gradient_of_another_rank_is_located[{case}]" for case in ("dp2", "cp2")),
    *(
        f"test_tools.py::test_the_plan_counts_what_is_held[{case}]"
        for case in ("dp2-adamw", "tp2-adamw", "cp2-adamw", "pp2-adamw")
    ),
)
