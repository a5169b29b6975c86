//! Stands in for EdgeCore on a socket and prints what mappers say: `dmi-listen /tmp/dmi.sock`.
//!
//! For authors who want to see their mapper talk before there is a node, and for holding the server
//! against clients that are not ours.

use skerry_dmi::v1beta1 as dmi;
use skerry_dmi::v1beta1::device_manager_service_server::{
    DeviceManagerService, DeviceManagerServiceServer,
};
use tonic::{Request, Response, Status};

struct Printer;

#[tonic::async_trait]
impl DeviceManagerService for Printer {
    async fn mapper_register(
        &self,
        request: Request<dmi::MapperRegisterRequest>,
    ) -> Result<Response<dmi::MapperRegisterResponse>, Status> {
        println!("{:?}", request.into_inner());
        Ok(Response::new(dmi::MapperRegisterResponse::default()))
    }

    async fn report_device_status(
        &self,
        request: Request<dmi::ReportDeviceStatusRequest>,
    ) -> Result<Response<dmi::ReportDeviceStatusResponse>, Status> {
        println!("{:?}", request.into_inner());
        Ok(Response::new(dmi::ReportDeviceStatusResponse {}))
    }

    async fn report_device_states(
        &self,
        request: Request<dmi::ReportDeviceStatesRequest>,
    ) -> Result<Response<dmi::ReportDeviceStatesResponse>, Status> {
        println!("{:?}", request.into_inner());
        Ok(Response::new(dmi::ReportDeviceStatesResponse {}))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let Some(path) = std::env::args().nth(1) else {
        eprintln!("usage: dmi-listen SOCKET");
        std::process::exit(2);
    };
    match skerry_dmi::bind(&path) {
        Ok(listener) => {
            let service = DeviceManagerServiceServer::new(Printer);
            skerry_dmi::serve(listener, service, std::future::pending()).await;
        }
        Err(error) => {
            eprintln!(
                "{error}: {}",
                std::error::Error::source(&error).map_or(String::new(), ToString::to_string)
            );
            std::process::exit(2);
        }
    }
}
