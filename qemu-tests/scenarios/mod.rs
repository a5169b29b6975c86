//! One file per claim; the claim is the first paragraph of the file.

use skerry_qemu_tests::scenario::Scenario;

mod parts;

pub(crate) use update_usb::WRITTEN;

/// Declares the modules and the list in one place, so that no file can be forgotten.
macro_rules! scenarios {
    ($($name:ident $(: $ci:ident)?),* $(,)?) => {
        $(mod $name;)*
        /// Every scenario, in the order of playing.
        pub(crate) const ALL: &[Scenario] = &[$(Scenario {
            name: stringify!($name),
            source: include_str!(concat!(stringify!($name), ".rs")),
            ci: false $(|| stringify!($ci).len() == 2)?,
            run: $name::run,
        }),*];
    };
}

// `ci` marks those that `cargo xtask test` plays.
scenarios! {
    first_boot_uefi,
    first_boot_kernel: ci,
    workload_from_push: ci,
    cut_and_heal,
    power_cut_offline,
    usb_stick,
    smbios,
    no_site_file,
    wrong_token,
    wrong_ca,
    expired_token,
    broken_site_file,
    duplicate_name,
    no_network,
    no_dhcp,
    bad_link,
    full_state,
    clock_1970,
    little_memory,
    secure_boot,
    corrupted_root,
    bad_version,
    update_usb,
    update_by_push,
    update_panics,
    update_power_cut,
    foreign_state,
    two_disks,
    small_disk,
    read_only_disk,
    no_disk,
    power_button,
}
