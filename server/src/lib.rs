//! The backup server: owns images and chains.
