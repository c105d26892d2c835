"""How results are measured: PSNR and SSIM, multiply-accumulates, parameters."""
