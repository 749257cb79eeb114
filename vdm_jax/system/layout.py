"""The names of the stages. The sizes that follow from a config join them here."""

STAGES = ("video_autoencoder", "audio_autoencoder", "clip", "denoiser")  # in the order of training
