"""The arguments of diffusers' schedulers with their defaults, as in version 0.42."""

# Arguments that many classes share.
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
BETAS |= {"trained_betas": None, "prediction_type": "epsilon", "steps_offset": 0}
ZERO_SNR = {"rescale_betas_zero_snr": False}
STABLE = {"beta_start": 0.00085, "beta_end": 0.012}
THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
FLOW = {"use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False, "time_shift_type": "exponential"}
FINAL = {"final_sigmas_type": "zero"}
LAMBDA = {"lambda_min_clipped": -float("inf")}
DPM = {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True}
EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0}
EDM |= {"num_train_timesteps": 1000, "prediction_type": "epsilon", **FINAL}

DDPM = {**BETAS, **ZERO_SNR, **CLIP, **THRESHOLD, "variance_type": "fixed_small", "timestep_spacing": "leading"}
DDIM = {**BETAS, **ZERO_SNR, **CLIP, **THRESHOLD, "set_alpha_to_one": True, "timestep_spacing": "leading"}
PNDM = {**BETAS, "skip_prk_steps": False, "set_alpha_to_one": False, "timestep_spacing": "leading"}
MULTISTEP = {**BETAS, **ZERO_SNR, **THRESHOLD, **DPM, **SIGMAS, **FLOW, **FINAL, **LAMBDA}
MULTISTEP |= {"euler_at_final": False, "use_lu_lambdas": False, "variance_type": None, "timestep_spacing": "linspace"}
SINGLESTEP = {**BETAS, **THRESHOLD, **DPM, **SIGMAS, **FLOW, **FINAL, **LAMBDA, "lower_order_final": False}
SINGLESTEP |= {"variance_type": None, "timestep_spacing": "linspace"}
UNIPC = {**BETAS, **ZERO_SNR, **THRESHOLD, **SIGMAS, **FLOW, **FINAL, "solver_order": 2, "predict_x0": True}
UNIPC |= {"solver_type": "bh2", "lower_order_final": True, "disable_corrector": (), "solver_p": None}
UNIPC |= {"timestep_spacing": "linspace", "sigma_min": None, "sigma_max": None, "shift_terminal": None}
DEIS = {**BETAS, **THRESHOLD, **SIGMAS, **FLOW, "solver_order": 2, "algorithm_type": "deis"}
DEIS |= {"solver_type": "logrho", "lower_order_final": True, "timestep_spacing": "linspace"}
EULER = {**BETAS, **ZERO_SNR, **SIGMAS, **FINAL, "interpolation_type": "linear", "timestep_type": "discrete"}
EULER |= {"sigma_min": None, "sigma_max": None, "timestep_spacing": "linspace"}
ANCESTRAL = {**BETAS, **ZERO_SNR, "timestep_spacing": "linspace"}
LMS = {**BETAS, **SIGMAS, "timestep_spacing": "linspace"}
HEUN = {**LMS, **STABLE, "clip_sample": False, "clip_sample_range": 1.0}
EDM_DPM = {**EDM, **THRESHOLD, **DPM, "euler_at_final": False}
FLOW_EULER = {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5}
FLOW_EULER |= {"max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096, "invert_sigmas": False}
FLOW_EULER |= {"shift_terminal": None, **SIGMAS, "time_shift_type": "exponential", "stochastic_sampling": False}

FLOW_HEUN = {"num_train_timesteps": 1000, "shift": 1.0}
KDPM2 = {**LMS, **STABLE}
DISTILLED = {**DDIM, **STABLE, "beta_schedule": "scaled_linear", "clip_sample": False, "original_inference_steps": 50}
DISTILLED |= {"timestep_scaling": 10.0}
SDE = {**LMS, **STABLE, "noise_sampler_seed": None}
SA = {**BETAS, **THRESHOLD, **SIGMAS, **LAMBDA, "use_flow_sigmas": False, "flow_shift": 1.0, "predictor_order": 2}
SA |= {"corrector_order": 2, "tau_func": None, "algorithm_type": "data_prediction", "lower_order_final": True}
SA |= {"variance_type": None, "timestep_spacing": "linspace"}

CONSISTENCY = {"num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "s_noise": 1.0}
CONSISTENCY |= {"rho": 7.0, "clip_denoised": True}
