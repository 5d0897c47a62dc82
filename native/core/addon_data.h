// Per-environment state of the addon: one for the main thread and one for each worker.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_set>

#include "native/core/status.h"
#include "native/core/storage.h"
#include "native/napi_setup.h"

namespace vlm_grpo {

// One asynchronous call. Made on the JavaScript thread, run on a runner thread, finished on the
// JavaScript thread. It holds the storages it works on, and no JavaScript value but its callback.
class AsyncJob {
 public:
  virtual ~AsyncJob() = default;
  virtual Status Run(const std::atomic<bool>& cancelled) = 0;

  std::atomic<bool> cancelled{false};
  Status status;
  napi_ref callback = nullptr;
  uint32_t id = 0;
};

// The way back to one JavaScript thread. Runner threads hold it by shared_ptr and may find it
// closed: a worker can be terminated while its jobs run, and they then end unheard.
class CompletionChannel {
 public:
  // Runs `job` off-thread, then calls callback(error | undefined) on this JavaScript thread.
  // Returns the job's id, for Abort.
  static uint32_t Start(Napi::Env env, std::shared_ptr<CompletionChannel> self,
                        std::shared_ptr<AsyncJob> job, Napi::Function callback);
  void Abort(uint32_t id);
  void Close();

 private:
  static void OnJavaScriptThread(napi_env env, napi_value, void* context, void* data);
  void Open(Napi::Env env, std::shared_ptr<CompletionChannel> self);

  std::mutex mutex_;  // guards closed_ and, against it, calls through tsfn_
  bool closed_ = true;
  napi_threadsafe_function tsfn_ = nullptr;
  // The rest belongs to the JavaScript thread.
  std::unordered_set<std::shared_ptr<AsyncJob>> jobs_;
  uint32_t next_id_ = 1;
};

struct AddonData {
  std::shared_ptr<CompletionChannel> channel = std::make_shared<CompletionChannel>();

  ~AddonData() { channel->Close(); }
};

// An Error with a `code`, which lib/errors.ts turns into a class.
Napi::Error MakeError(Napi::Env env, const Status& status);

// The storage behind a NativeStorage object, or null if `value` is not one or was disposed.
std::shared_ptr<Storage> StorageOf(Napi::Env env, Napi::Value value);

}  // namespace vlm_grpo
