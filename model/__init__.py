"""SimSiam: backbone, projector, predictor and the loss (Chen & He 2020)."""
