// How asynchronous calls come back to JavaScript.
//
// One thread-safe function per environment, referenced only while jobs are pending, so an idle
// addon never keeps the process alive. Three things can happen to a job: it finishes and its
// callback runs; it is aborted, which ends it early with CANCELLED through the same path; or its
// environment goes away first (worker.terminate()), and then its result is dropped. For the last
// case Node finalizes the thread-safe function on the JavaScript thread, which marks the channel
// closed under its mutex: a runner thread either calls before that, or not at all.
#include <utility>

#include "native/core/addon_data.h"
#include "native/core/job_queue.h"

namespace vlm_grpo {
namespace {

const char* CodeName(vlm_grpo_status code) {
  switch (code) {
    case VLM_GRPO_INVALID_ARGUMENT:
      return "INVALID_ARGUMENT";
    case VLM_GRPO_OUT_OF_MEMORY:
      return "OUT_OF_MEMORY";
    case VLM_GRPO_CANCELLED:
      return "CANCELLED";
    default:
      return "INTERNAL";
  }
}

}  // namespace

Napi::Error MakeError(Napi::Env env, const Status& status) {
  Napi::Error error = Napi::Error::New(env, status.message);
  error.Set("code", CodeName(status.code));
  return error;
}

void CompletionChannel::Open(Napi::Env env, std::shared_ptr<CompletionChannel> self) {
  auto* context = new std::shared_ptr<CompletionChannel>(std::move(self));
  const napi_status status = napi_create_threadsafe_function(
      env, nullptr, nullptr, Napi::String::New(env, "vlm-grpo"), 0, 1, context,
      [](napi_env, void*, void* finalize_hint) {
        auto* held = static_cast<std::shared_ptr<CompletionChannel>*>(finalize_hint);
        (*held)->Close();
        delete held;
      },
      context, OnJavaScriptThread, &tsfn_);
  if (status != napi_ok) {
    delete context;
    throw Napi::Error::New(env, "Could not create a thread-safe function");
  }
  napi_unref_threadsafe_function(env, tsfn_);
  std::lock_guard<std::mutex> lock(mutex_);
  closed_ = false;
}

uint32_t CompletionChannel::Start(Napi::Env env, std::shared_ptr<CompletionChannel> self,
                                  std::shared_ptr<AsyncJob> job, Napi::Function callback) {
  CompletionChannel& channel = *self;
  if (channel.tsfn_ == nullptr) channel.Open(env, self);
  job->id = channel.next_id_++;
  napi_create_reference(env, callback, 1, &job->callback);
  const bool queued = EnqueueJob([self, job] {
    job->status = job->Run(job->cancelled);
    std::lock_guard<std::mutex> lock(self->mutex_);
    if (self->closed_) return;
    napi_call_threadsafe_function(self->tsfn_, new std::shared_ptr<AsyncJob>(job),
                                  napi_tsfn_nonblocking);
  });
  if (!queued) {
    napi_delete_reference(env, job->callback);
    throw MakeError(env, {VLM_GRPO_OUT_OF_MEMORY, "Could not start a thread"});
  }
  if (channel.jobs_.empty()) napi_ref_threadsafe_function(env, channel.tsfn_);
  const uint32_t id = job->id;
  channel.jobs_.insert(std::move(job));
  return id;
}

void CompletionChannel::OnJavaScriptThread(napi_env raw_env, napi_value, void* context,
                                           void* data) {
  auto* boxed = static_cast<std::shared_ptr<AsyncJob>*>(data);
  const std::shared_ptr<AsyncJob> job = std::move(*boxed);
  delete boxed;
  if (raw_env == nullptr) return;  // the environment is being torn down: nobody is left to tell
  Napi::Env env(raw_env);
  Napi::HandleScope scope(env);
  CompletionChannel& channel = **static_cast<std::shared_ptr<CompletionChannel>*>(context);
  channel.jobs_.erase(job);
  if (channel.jobs_.empty()) napi_unref_threadsafe_function(env, channel.tsfn_);
  napi_value callback;
  napi_get_reference_value(env, job->callback, &callback);
  napi_delete_reference(env, job->callback);
  napi_value error = job->status.ok() ? env.Undefined() : MakeError(env, job->status).Value();
  napi_call_function(env, env.Undefined(), callback, 1, &error, nullptr);
}

void CompletionChannel::Abort(uint32_t id) {
  for (const std::shared_ptr<AsyncJob>& job : jobs_) {
    if (job->id == id) job->cancelled = true;
  }
}

void CompletionChannel::Close() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return;
    closed_ = true;
  }
  for (const std::shared_ptr<AsyncJob>& job : jobs_) job->cancelled = true;
  jobs_.clear();
  napi_release_threadsafe_function(tsfn_, napi_tsfn_release);
}

}  // namespace vlm_grpo
