//! How features are judged: the neighbours of a sample and their votes, subsets of a data set by
//! class, counts of right and wrong predictions.
//!
//! Source of the k-NN protocol: eval_knn.py of facebookresearch/dino.

pub mod knn;
pub mod metrics;
pub mod subset;
