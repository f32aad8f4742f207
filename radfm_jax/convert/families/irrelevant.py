"""Keys of config.json that do not change the decoder, with the reason. They travel through a checkpoint unchanged."""

GENERATION = "a default of generate(): generation_config.json and the tokenizer have what inference uses"
TRAINING = "a setting of the original training"
RESULTS = "selects what the class in transformers returns"
HEADS = "belongs to classification heads, which a language model does not have"
RECORD = "a record of the library that wrote the file"

IRRELEVANT = {
    reason: names.split()
    for reason, names in {
        GENERATION: """
            bos_token_id eos_token_id unk_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id
            forced_eos_token_id bad_words_ids suppress_tokens begin_suppress_tokens max_length min_length
            max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
            top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty length_penalty no_repeat_ngram_size
            encoder_no_repeat_ngram_size encoder_repetition_penalty num_return_sequences output_scores
            return_dict_in_generate remove_invalid_values exponential_decay_length_penalty num_assistant_tokens
            num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind
            use_cache cache_implementation prefix
            tokenizer_class""",
        TRAINING: "initializer_range attention_dropout resid_pdrop embd_pdrop hidden_dropout pretraining_tp",
        RESULTS: "output_attentions output_hidden_states return_dict chunk_size_feed_forward torchscript",
        HEADS: "num_labels id2label label2id problem_type finetuning_task task_specific_params",
        RECORD: """
            transformers_version transformers.js_config architectures model_type name_or_path _name_or_path
            _model_name_or_path _commit_hash torch_dtype dtype use_bfloat16 tf_legacy_loss _attn_implementation
            _attn_implementation_autoset _attn_implementation_internal _experts_implementation_internal
            base_model_tp_plan unsloth_version unsloth_fixed""",
    }.items()
}
# Keys of encoders and decoders of older versions: with these values, the model is a plain decoder.
PLAIN = {
    "is_encoder_decoder": (False,), "is_decoder": (False,), "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,), "tie_encoder_decoder": (False,), "pruned_heads": ({},),
    "quantization_config": (None,), "per_layer_config": (None,),
}  # fmt: skip
REMEDIES = {
    "quantization_config": "the weights are quantised: load them with transformers, call dequantize(), save them again",
}
REASONS = {name: reason for reason, names in IRRELEVANT.items() for name in names}
# Keys that describe the source, not the export.
NOT_KEPT = ("architectures", "model_type", "torch_dtype", "dtype", "auto_map", "name_or_path", "_name_or_path")
