//! Kubernetes object types that Skerry adds to a cluster, and those of KubeEdge that it shares.
//!
//! One module per API group and version. [`crds`] gives the CustomResourceDefinition of every kind that lives in a
//! cluster; kinds that live only in a fleet repository (`App`, `OsRelease`) have a type here and no definition.
//!
//! No I/O. The cluster types implement `k8s_openapi::Resource` and `Metadata`, so `kube::Api<Release>` works.

pub mod fleet;
pub mod kubeedge;
pub mod reliablesyncs;

use serde_json::Value;

/// Every CustomResourceDefinition of this crate, as objects that can be applied.
pub fn crds() -> Vec<Value> {
    let mut crds = fleet::v1alpha1::crds();
    crds.extend(reliablesyncs::v1alpha1::crds());
    crds
}

/// Implements the traits that make a struct with `metadata`, `spec` and `status` a Kubernetes resource.
macro_rules! resource {
    ($kind:ident, $group:expr, $version:expr, $plural:expr, $scope:ty) => {
        impl k8s_openapi::Resource for $kind {
            const API_VERSION: &'static str = concat!($group, "/", $version);
            const GROUP: &'static str = $group;
            const KIND: &'static str = stringify!($kind);
            const VERSION: &'static str = $version;
            const URL_PATH_SEGMENT: &'static str = $plural;
            type Scope = $scope;
        }

        impl k8s_openapi::Metadata for $kind {
            type Ty = k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

            fn metadata(&self) -> &Self::Ty {
                &self.metadata
            }

            fn metadata_mut(&mut self) -> &mut Self::Ty {
                &mut self.metadata
            }
        }

        // Written by hand because `apiVersion` and `kind` have to be in every body that goes to an API server and
        // are constants, not fields.
        impl serde::Serialize for $kind {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                use serde::ser::SerializeStruct;
                let fields = 4 + usize::from(self.status.is_some());
                let mut object = serializer.serialize_struct(stringify!($kind), fields)?;
                object
                    .serialize_field("apiVersion", <Self as k8s_openapi::Resource>::API_VERSION)?;
                object.serialize_field("kind", <Self as k8s_openapi::Resource>::KIND)?;
                object.serialize_field("metadata", &self.metadata)?;
                object.serialize_field("spec", &self.spec)?;
                match &self.status {
                    Some(status) => object.serialize_field("status", status)?,
                    None => object.skip_field("status")?,
                }
                object.end()
            }
        }
    };
}
pub(crate) use resource;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_definition_is_named_after_its_plural_and_group_and_stores_one_version() {
        let crds = crds();
        assert_eq!(crds.len(), 7);
        for crd in crds {
            let spec = &crd["spec"];
            let name = format!(
                "{}.{}",
                spec["names"]["plural"].as_str().unwrap(),
                spec["group"].as_str().unwrap()
            );
            assert_eq!(crd["metadata"]["name"], name);
            let versions = spec["versions"].as_array().unwrap();
            assert_eq!(versions.iter().filter(|version| version["storage"] == true).count(), 1);
            assert!(
                versions
                    .iter()
                    .all(|version| version["schema"]["openAPIV3Schema"]["type"] == "object")
            );
        }
    }
}
