//! `reliablesyncs.kubeedge.io`: what CloudCore remembers of each object's delivery to each node.

pub mod v1alpha1;
